"""Tokenise pairs and lay them out in a batch: chosen rows first, rejected rows second."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import NamedTuple

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


def fit_pair(
    tokenizer: Tokenizer, row: Mapping[str, str], max_length: int, side: str
) -> TokenPair | None:
    """Return the pair of a row {prompt, chosen, rejected}, its prompt shortened until it fits.

    The prompt's own words are cut, at the end or (`side` "left") at the beginning; what a chat
    template puts around them stays, and so do the completions. None where that is not enough.
    """
    prompt, sides = row["prompt"], (row["chosen"], row["rejected"])
    pair = tokenise_pair(tokenizer, prompt, *sides)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    while (over := pair.length - max_length) > 0:
        if over >= len(ids):
            return None
        ids = ids[over:] if side == "left" else ids[:-over]
        # A character may be cut through, which decodes to the replacement character.
        prompt = tokenizer.decode(ids).strip("\N{REPLACEMENT CHARACTER}")
        pair = replace(tokenise_pair(tokenizer, prompt, *sides), shortened=True)
    return pair


class TokenisedPairs(NamedTuple):
    """The pairs that can be trained on; `report`: what was done to the others, and to how many."""

    pairs: list[TokenPair]
    report: dict[str, int]


def load_pairs(run: Run, split: str, tokenizer: Tokenizer, model: ModelSection) -> TokenisedPairs:
    """Return the tokenised pairs of a split of the run, and what was left out or shortened."""
    frame = pd.read_parquet(run.require(f"pairs/{split}.parquet"))
    rows = frame[["prompt", "chosen", "rejected"]].to_dict("records")
    return tokenise_pairs(tokenizer, rows, model.max_length, model.truncation_side)


def tokenise_pairs(
    tokenizer: Tokenizer, rows: Iterable[Mapping[str, str]], max_length: int, side: str = "right"
) -> TokenisedPairs:
    """Tokenise rows {prompt, chosen, rejected}; raises DataError when no pair is left.

    A completion is never cut: what is too long is taken from the prompt (:func:`fit_pair`).
    """
    pairs: list[TokenPair] = []
    report: Counter[str] = Counter()
    for row in rows:
        if not row["chosen"].strip() or not row["rejected"].strip():
            report["left out, empty completion"] += 1
            continue
        pair = fit_pair(tokenizer, row, max_length, side)
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
            f"Raise model.max_length (now {max_length}), or make more pairs in notebook "
            "04_reference_cache (pairs.notes, pairs.samples_per_note).",
        )
    return TokenisedPairs(pairs, dict(+report))  # + drops what counts 0


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
    lay_out = _lay_out_shared if shared else _lay_out_plain
    batch, starts = lay_out(pairs, pad_id, chosen_only)
    sides = [[pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]]
    completions = [ids for side in sides[: 1 if chosen_only else 2] for ids in side]
    predictors = [
        position
        for (before, first), ids in zip(starts, completions, strict=True)
        for position in [before, *range(first, first + len(ids) - 1)]
    ]
    return batch | {
        "predictors": torch.tensor(predictors),
        "targets": torch.tensor([token for ids in completions for token in ids]),
        "counts": torch.tensor([len(ids) for ids in completions]),
        "ref_chosen_logps": torch.tensor([pair.ref_chosen_logps for pair in pairs]),
        "ref_rejected_logps": torch.tensor([pair.ref_rejected_logps for pair in pairs]),
    }


# The batch and, per completion, the flat positions of its prompt's last token and its own first.
Layout = tuple[dict[str, torch.Tensor], list[tuple[int, int]]]


def _lay_out_plain(pairs: Sequence[TokenPair], pad_id: int, chosen_only: bool) -> Layout:
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rows += [] if chosen_only else [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    input_ids, _ = pad_rows(rows, pad_id)
    first = [i * input_ids.shape[1] + len(prompt) for i, (prompt, _) in enumerate(rows)]
    return {"input_ids": input_ids}, [(at - 1, at) for at in first]


def _lay_out_shared(pairs: Sequence[TokenPair], pad_id: int, chosen_only: bool) -> Layout:
    ids: list[int] = []
    positions: list[int] = []
    chosen, rejected, lengths = [], [], []
    for pair in pairs:
        end = len(ids) + len(pair.prompt_ids)
        prompt, first = len(pair.prompt_ids), len(pair.prompt_ids + pair.chosen_ids)
        second = [] if chosen_only else pair.rejected_ids
        chosen.append((end - 1, end))
        rejected.append((end - 1, end + len(pair.chosen_ids)))
        lengths.append([prompt, len(pair.chosen_ids), len(second)])
        ids += pair.prompt_ids + pair.chosen_ids + second
        positions += [*range(first), *range(prompt, prompt + len(second))]
    batch = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
    starts = chosen if chosen_only else chosen + rejected
    return batch | {"pair_lengths": torch.tensor(lengths)}, starts
