"""How far a card reaches with the cached reference: longest pair, most pairs at a time.

`python -m hallulib.memory.reach` makes hallulib/memory/reach.json anew (half an hour on one core).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hallulib.files import write_json_atomic
from hallulib.memory.counts import load_model_config
from hallulib.memory.planner import find_largest_batch, find_longest_sequence
from hallulib.memory.prediction_cache import decisive_versions
from hallulib.memory.table import CARDS_GB, MODELS, make_large_recipe

SHIPPED = Path(__file__).parent / "reach.json"
STRATEGY, TOKENS = "cached_reference_pass2", 1024


def find_reach(model: str, card_gb: float) -> dict[str, Any]:
    """Return {model, card_gb, longest, batch}: tokens of the longest single pair, and how many
    pairs of 1,024 tokens fit at a time; NF4, bf16, checkpointing. 0 where not even one fits; the
    search ends at the model's positions (at most 32,768) and at 64 pairs."""
    config, recipe = load_model_config(model), make_large_recipe(model, gradient_checkpointing=True)
    return {
        "model": model,
        "card_gb": card_gb,
        "longest": find_longest_sequence(config, recipe, STRATEGY, card_gb),
        "batch": find_largest_batch(config, recipe, STRATEGY, card_gb, TOKENS),
    }


def read_reach() -> list[dict[str, Any]]:
    """Return what :func:`find_reach` found for every model and card, as it ships."""
    return json.loads(SHIPPED.read_text("utf-8"))["reach"]


def main() -> None:
    """Search every model and card, and write the result where the package finds it."""
    cases = [(model, card) for model in MODELS for card in CARDS_GB]
    found = [find_reach(*case) for case in tqdm(cases, unit="card")]
    write_json_atomic(SHIPPED, {"libraries": decisive_versions(), "reach": found})


if __name__ == "__main__":
    main()
