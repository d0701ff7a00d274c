"""How long texts are in tokens, and what a limit on them would cut; for rows and pairs alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hallulib.models import render_prompt

BATCH = 128  # texts tokenised at a time: a token takes a hundred bytes until it is counted


def count_completion_tokens(tokenizer: Any, completions: Sequence[str]) -> np.ndarray:
    """Tokens of each completion, its end token included."""
    lengths: list[int] = []
    for start in range(0, len(completions), BATCH):
        batch = list(completions[start : start + BATCH])
        ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        lengths += [len(text) + 1 for text in ids]
    return np.array(lengths, dtype=int)


def count_prompt_tokens(tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """Tokens of each prompt as the model sees it, after the chat template."""
    rendered = [render_prompt(tokenizer, prompt) for prompt in prompts]
    return count_completion_tokens(tokenizer, rendered) - 1


def describe_cuts(
    prompts: np.ndarray, completions: np.ndarray, max_length: int
) -> dict[str, int | float]:
    """What max_length does to rows of a prompt and a completion, by the end that is cut.

    cut, cut_share: rows that do not fit; this course leaves them out. Cut at the end, as many
    trainers do, they lose label tokens: `label_tokens_lost` is their share of all, and
    `labels_all_lost` counts the rows without any left.
    """
    over = np.maximum(prompts + completions - max_length, 0)
    lost = np.minimum(over, completions)
    return {
        "cut": int((over > 0).sum()),
        "cut_share": float((over > 0).mean()),
        "label_tokens_lost": float(lost.sum() / completions.sum()),
        "labels_all_lost": int((lost == completions).sum()),
    }


def describe_length_bias(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float] | None:
    """How much longer the rejected side is, in tokens, or None without pairs; `preferred_shorter`
    is the share of pairs that "take the shorter one" gets right (0.5: length tells nothing)."""
    if not len(chosen):
        return None
    gap = rejected - chosen
    return {
        "pairs": len(gap),
        "mean_gap": round(float(gap.mean()), 3),
        "preferred_shorter": round(float((gap > 0).mean() + (gap == 0).mean() / 2), 4),
    }
