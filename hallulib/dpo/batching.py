"""Tokenise pairs and lay them out in a batch: chosen rows first, rejected rows second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hallulib.errors import DataError
from hallulib.scoring import encode_completion, pad_rows


@dataclass(frozen=True)
class TokenPair:
    """Token ids of one pair; both completions follow the same prompt ids and end in one EOS."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the longer of the two rows this pair makes."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def address(self) -> str:
        """sha256 of the token ids and of which of them are completion: what the pair is."""
        digest = sha256()
        for ids in (self.prompt_ids, self.chosen_ids, self.rejected_ids):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.asarray(ids, dtype="<i8").tobytes())
        return digest.hexdigest()


def tokenise_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chosen: str, rejected: str
) -> TokenPair:
    """Return the token ids of a pair; where one side merges into the prompt, both start there."""
    left, chosen_ids = encode_completion(tokenizer, prompt, chosen)
    right, rejected_ids = encode_completion(tokenizer, prompt, rejected)
    cut = min(len(left), len(right))
    return TokenPair(left[:cut], left[cut:] + chosen_ids, right[cut:] + rejected_ids)


def tokenise_pairs(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, Any]], max_length: int
) -> tuple[list[TokenPair], dict[str, int]]:
    """Return the pairs of rows {prompt, chosen, rejected}, and how many were left out, by reason.

    A pair that does not fit max_length is left out, not cut. Raises DataError when none is left.
    """
    pairs, dropped, count = [], Counter(), 0
    for row in rows:
        count += 1
        pair = tokenise_pair(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        if not row["chosen"].strip() or not row["rejected"].strip():
            dropped["empty completion"] += 1
        elif pair.chosen_ids == pair.rejected_ids:
            dropped["identical completions"] += 1
        elif pair.length > max_length:
            dropped["longer than model.max_length"] += 1
        else:
            pairs.append(pair)
    if not pairs:
        raise DataError(
            f"None of {count} pairs can be trained on: {dict(dropped)}.",
            f"Raise model.max_length (now {max_length}), or make more pairs in notebook "
            "04_reference_cache (pairs.notes, pairs.samples_per_note).",
        )
    return pairs, dict(dropped)


def collate_pairs(
    pairs: Sequence[TokenPair], pad_id: int, chosen_only: bool = False
) -> dict[str, torch.Tensor]:
    """Return input_ids and completion_mask, (2 * pairs, tokens): chosen first, rejected second.

    Padded on the right. With `chosen_only` the rejected half is left out.
    """
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    if not chosen_only:
        rows += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    input_ids, mask = pad_rows(rows, pad_id)
    return {"input_ids": input_ids, "completion_mask": mask}
