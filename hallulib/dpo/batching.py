"""Tokenise pairs and lay them out in a batch: chosen rows first, rejected rows second."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from hallulib.errors import DataError
from hallulib.recipe_sections import ModelSection
from hallulib.run import Run
from hallulib.scoring import encode_completion, pad_rows


@dataclass(frozen=True)
class TokenPair:
    """Token ids of one pair; both completions follow the same prompt ids and end in one EOS.

    `shortened`: words of the prompt were cut so that the pair fits. `ref_chosen_logps`,
    `ref_rejected_logps`: what the reference gives the completions, in nats (0 until it is known).
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    shortened: bool = field(default=False, compare=False)
    ref_chosen_logps: float = field(default=0.0, compare=False)
    ref_rejected_logps: float = field(default=0.0, compare=False)

    @property
    def length(self) -> int:
        """Tokens of the longer of the two rows this pair makes."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def address(self) -> bytes:
        """sha256 of the token ids and of which of them are completion: what the pair is."""
        content = json.dumps([self.prompt_ids, self.chosen_ids, self.rejected_ids])
        return sha256(content.encode()).digest()


def tokenise_pair(tokenizer: Tokenizer, prompt: str, chosen: str, rejected: str) -> TokenPair:
    """Return the token ids of a pair; where one side merges into the prompt, both start there."""
    left, chosen_ids = encode_completion(tokenizer, prompt, chosen)
    right, rejected_ids = encode_completion(tokenizer, prompt, rejected)
    cut = min(len(left), len(right))
    return TokenPair(left[:cut], left[cut:] + chosen_ids, right[cut:] + rejected_ids)


def fit_pair(tokenizer: Tokenizer, row: dict[str, str], model: ModelSection) -> TokenPair | None:
    """Return the pair of a row {prompt, chosen, rejected}, its prompt shortened until it fits.

    The prompt's own words are cut, at the end or (truncation_side "left") at the beginning; what a
    chat template puts around them stays, and so do the completions. None if that is not enough.
    """
    prompt, sides = row["prompt"], (row["chosen"], row["rejected"])
    pair = tokenise_pair(tokenizer, prompt, *sides)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    while (over := pair.length - model.max_length) > 0:
        if over >= len(ids):
            return None
        ids = ids[over:] if model.truncation_side == "left" else ids[:-over]
        # A character may be cut through, which decodes to the replacement character.
        prompt = tokenizer.decode(ids).strip("\N{REPLACEMENT CHARACTER}")
        pair = replace(tokenise_pair(tokenizer, prompt, *sides), shortened=True)
    return pair


def load_pairs(
    run: Run, split: str, tokenizer: Tokenizer, model: ModelSection
) -> tuple[list[TokenPair], dict[str, int]]:
    """Return the pairs of a split that can be trained on, and how many others were left out or
    shortened, by reason. A completion is never cut: what is too long is taken from the prompt.

    Raises DataError when no pair is left.
    """
    pairs: list[TokenPair] = []
    report: Counter[str] = Counter()
    for row in pd.read_parquet(run.require(f"pairs/{split}.parquet")).to_dict("records"):
        if not row["chosen"].strip() or not row["rejected"].strip():
            report["left out, empty completion"] += 1
            continue
        pair = fit_pair(tokenizer, row, model)
        if pair is None:
            report["left out, completion longer than model.max_length"] += 1
        elif pair.chosen_ids == pair.rejected_ids:
            report["left out, identical completions"] += 1
        else:
            pairs.append(pair)
            report["with a prompt shortened to fit"] += pair.shortened
    if not pairs:
        raise DataError(
            f"None of {report.total()} pairs can be trained on: {dict(report)}.",
            f"Raise model.max_length (now {model.max_length}), or pairs.notes in notebook 04.",
        )
    return pairs, dict(+report)  # + drops what counts 0


def collate_pairs(
    pairs: Sequence[TokenPair], pad_id: int, shared: bool = False, chosen_only: bool = False
) -> dict[str, torch.Tensor]:
    """Lay pairs out as a batch; with `chosen_only` the rejected completions are left out.

    predictors, targets (completion tokens,): the flat position in input_ids that predicts each
    completion token, and that token; all chosen completions first, then all rejected. counts
    (completions,): tokens of each. ref_chosen_logps, ref_rejected_logps (pairs,): what the pairs
    carry, in nats. And, by layout:

    plain   input_ids (completions, tokens), padded on the right, the prompt before each completion
    shared  input_ids, position_ids (1, tokens), each pair as [prompt | chosen | rejected] without
            padding, and pair_lengths (pairs, 3): the lengths of the three
    """
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rows += [] if chosen_only else [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    # Where, for each completion, its prompt ends and itself begins: flat positions in input_ids.
    if shared:
        batch, starts = _share_prompts(pairs, chosen_only)
    else:
        batch = {"input_ids": pad_rows(rows, pad_id)[0]}
        width = batch["input_ids"].shape[1]
        starts = [(i * width + len(prompt),) * 2 for i, (prompt, _) in enumerate(rows)]
    predictors = [
        position
        for (end, first), (_, ids) in zip(starts, rows, strict=True)
        for position in [end - 1, *range(first, first + len(ids) - 1)]
    ]
    return batch | {
        "predictors": torch.tensor(predictors),
        "targets": torch.tensor([token for _, ids in rows for token in ids]),
        "counts": torch.tensor([len(ids) for _, ids in rows]),
        "ref_chosen_logps": torch.tensor([pair.ref_chosen_logps for pair in pairs]),
        "ref_rejected_logps": torch.tensor([pair.ref_rejected_logps for pair in pairs]),
    }


def _share_prompts(
    pairs: Sequence[TokenPair], chosen_only: bool
) -> tuple[dict[str, torch.Tensor], list[tuple[int, int]]]:
    ids, positions, lengths = [], [], []
    starts: tuple[list, list] = [], []  # of the chosen completions, of the rejected
    for pair in pairs:
        prompt, end = len(pair.prompt_ids), len(ids) + len(pair.prompt_ids)
        sides = [pair.chosen_ids, [] if chosen_only else pair.rejected_ids]
        ids += pair.prompt_ids
        positions += range(prompt)
        for found, side in zip(starts, sides, strict=True):
            found.append((end, len(ids)))
            ids += side
            positions += range(prompt, prompt + len(side))
        lengths.append([prompt, *map(len, sides)])
    batch = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    batch["pair_lengths"] = torch.tensor(lengths)
    return batch, starts[0] if chosen_only else starts[0] + starts[1]
