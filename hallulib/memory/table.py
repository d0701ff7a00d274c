"""Every strategy for the large models, one pair at a time: predicted once, shipped, looked up.

`python -m hallulib.memory.table` makes hallulib/memory/predictions.json anew (some minutes).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from hallulib.memory.counts import SHIPPED as MODELS
from hallulib.memory.counts import load_model_config
from hallulib.memory.peak import MemoryBudget, predict_peak
from hallulib.memory.prediction_cache import SHIPPED, PredictionCache, decisive_versions
from hallulib.memory.strategies import STRATEGIES
from hallulib.paths import write_json_atomic
from hallulib.recipe import Recipe, load_recipe

LENGTHS = (512, 1024, 2048)
CARDS_GB = (8, 10, 12, 16, 24)
COMPARED = tuple(s.name for s in STRATEGIES.values() if s.runs in ("dpo", "reference"))
UNCHECKPOINTED = ("dual_4bit", "cached_reference_pass2")


def list_large() -> Iterator[dict[str, Any]]:
    """Yield what the table holds: keywords of :func:`predict_large`."""
    for model in MODELS:
        for tokens in LENGTHS:
            for strategy in COMPARED:
                yield {"model": model, "strategy": strategy, "tokens": tokens}
            for strategy in UNCHECKPOINTED:
                yield {
                    "model": model, "strategy": strategy, "tokens": tokens, "checkpointing": False,
                }  # fmt: skip


def make_large_recipe(model: str, **model_settings: Any) -> Recipe:
    """Return the recipe of the table: NF4, bf16, LoRA r=16 on all linear layers, one pair."""
    settings = {"name_or_path": model, "quantization": "nf4", "dtype": "bfloat16"}
    ones = {"sft": {"batch_size": 1}, "dpo": {"batch_size": 1}, "reference": {"batch_size": 1}}
    return load_recipe("llama3-8b-12gb", {"model": settings | model_settings} | ones)


def predict_large(
    model: str, strategy: str, tokens: int, checkpointing: bool = True,
    cache: PredictionCache | None = None,
) -> MemoryBudget:
    """Return the prediction for one pair of `tokens`, half of them completion."""
    recipe = make_large_recipe(model, gradient_checkpointing=checkpointing)
    config = load_model_config(model)
    return predict_peak(config, recipe, strategy, sequence_tokens=tokens, cache=cache)


class _Collector(PredictionCache):
    """Keeps what is asked for in memory, to be shipped."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        return self.found.get(key)

    def put(self, key: str, values: dict[str, Any]) -> None:
        self.found[key] = values


def main() -> None:
    """Predict the whole table and write it where the package finds it."""
    collector = _Collector()
    for asked in tqdm(list(list_large()), unit="prediction"):
        predict_large(**asked, cache=collector)
    values = {"libraries": decisive_versions(), "predictions": collector.found}
    write_json_atomic(SHIPPED, values)


if __name__ == "__main__":
    main()
