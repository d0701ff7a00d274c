"""How long texts are in tokens, and what a limit on them would cut; for rows and pairs alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hallulib.models import render_prompt

PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
BATCH = 128  # texts tokenised at a time


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Tokens per text, without added special tokens: shape (len(texts),)."""
    lengths: list[int] = []
    for start in range(0, len(texts), BATCH):  # a token takes a hundred bytes until it is counted
        batch = list(texts[start : start + BATCH])
        ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        lengths += map(len, ids)
    return np.array(lengths, dtype=int)


def count_prompt_tokens(tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """Tokens of each prompt as the model sees it, after the chat template."""
    return count_tokens(tokenizer, [render_prompt(tokenizer, prompt) for prompt in prompts])


def count_completion_tokens(tokenizer: Any, completions: Sequence[str]) -> np.ndarray:
    """Tokens of each completion, its end token included."""
    return count_tokens(tokenizer, completions) + 1


def summarise_lengths(lengths: np.ndarray) -> dict[str, float] | None:
    """{min, mean, p5 ... p99, max} of token counts, or None where there are none."""
    if not len(lengths):
        return None
    cut_points = {f"p{p}": float(np.percentile(lengths, p)) for p in PERCENTILES}
    return {
        "min": int(lengths.min()), "mean": round(float(lengths.mean()), 1), **cut_points,
        "max": int(lengths.max()),
    }  # fmt: skip


def describe_cuts(
    prompts: np.ndarray, completions: np.ndarray, max_length: int
) -> dict[str, int | float]:
    """What max_length does to rows of a prompt and a completion, by the end that is cut.

    cut, cut_share: rows that do not fit. Cut at the end, as many trainers do, they lose label
    tokens: `label_tokens_lost` is their share of all, `labels_all_lost` the rows without any left.
    Cut in the prompt instead, they lose `prompt_tokens_lost` (a share) of what the note says, and
    `completion_too_long` cannot be saved at all. This course leaves such rows out.
    """
    over = np.maximum(prompts + completions - max_length, 0)
    lost = np.minimum(over, completions)
    return {
        "cut": int((over > 0).sum()),
        "cut_share": float((over > 0).mean()),
        "label_tokens_lost": float(lost.sum() / completions.sum()),
        "labels_all_lost": int((lost == completions).sum()),
        "prompt_tokens_lost": float(np.minimum(over, prompts).sum() / prompts.sum()),
        "completion_too_long": int((completions >= max_length).sum()),
    }


def describe_length_bias(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float] | None:
    """How much longer the rejected side is, in tokens, or None without pairs.

    `preferred_shorter` is the share of pairs that a rule "take the shorter one" gets right, ties
    half: 0.5 means that length tells nothing about the label.
    """
    if not len(chosen):
        return None
    gap = rejected - chosen
    shorter = (gap > 0).mean() + (gap == 0).mean() / 2
    return {
        "pairs": len(gap),
        "chosen_mean": round(float(chosen.mean()), 2),
        "rejected_mean": round(float(rejected.mean()), 2),
        "mean_gap": round(float(gap.mean()), 3),
        "preferred_shorter": round(float(shorter), 4),
    }
