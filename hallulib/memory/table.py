"""Every strategy for the large models: predicted once, shipped, looked up.

`python -m hallulib.memory.table` makes hallulib/memory/predictions.json anew (half an hour).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

from tqdm.auto import tqdm

from hallulib.files import write_text_atomic
from hallulib.memory.counts import SHIPPED as MODELS
from hallulib.memory.counts import load_model_config
from hallulib.memory.peak import MemoryBudget, predict_peak
from hallulib.memory.prediction_cache import SHIPPED, PredictionCache, decisive_versions
from hallulib.memory.strategies import STRATEGIES
from hallulib.recipe import Recipe, load_recipe

LENGTHS = (512, 1024, 2048)
BATCHES = (1, 2, 4)  # pairs at a time
# Two models in the precision that is asked for; the other strategies take it from the recipe.
TWO_MODELS = {"none": "dual_model", "int8": "dual_8bit", "nf4": "dual_4bit"}
CARDS_GB = (8, 10, 12, 16, 24)
COMPARED = tuple(s.name for s in STRATEGIES.values() if s.runs in ("dpo", "reference"))
UNCHECKPOINTED = ("dual_4bit", "cached_reference_pass2")


def list_large() -> Iterator[dict[str, Any]]:
    """Yield what stands side by side, one pair at a time in NF4: keywords of `predict_large`."""
    for model in MODELS:
        for tokens in LENGTHS:
            for strategy in COMPARED:
                yield {"model": model, "strategy": strategy, "tokens": tokens}
            for strategy in UNCHECKPOINTED:
                yield {
                    "model": model, "strategy": strategy, "tokens": tokens, "checkpointing": False,
                }  # fmt: skip


def list_strategies(quantization: str) -> tuple[str, ...]:
    """Return the strategies that are compared in one precision."""
    others = [name for name in COMPARED if name not in TWO_MODELS.values()]
    return (TWO_MODELS[quantization], *others)


def list_shipped() -> Iterator[dict[str, Any]]:
    """Yield what ships: `list_large`, and what the sliders of notebook 3 reach without computing
    (int8 with checkpointing only: without, all its layers must be traced)."""
    yield from list_large()
    for model, tokens, rows in product(MODELS, LENGTHS, BATCHES):
        for quantization, checkpointing in product(TWO_MODELS, (True, False)):
            if quantization == "int8" and not checkpointing:
                continue
            for strategy in list_strategies(quantization):
                yield {
                    "model": model, "strategy": strategy, "tokens": tokens, "rows": rows,
                    "checkpointing": checkpointing, "quantization": quantization,
                }  # fmt: skip


def make_large_recipe(model: str, **model_settings: Any) -> Recipe:
    """Return the recipe of the table: NF4, bf16, LoRA r=16 on all linear layers, one pair."""
    settings = {"name_or_path": model, "quantization": "nf4", "dtype": "bfloat16"}
    ones = {"sft": {"batch_size": 1}, "dpo": {"batch_size": 1}, "reference": {"batch_size": 1}}
    return load_recipe("llama3-8b-12gb", {"model": settings | model_settings} | ones)


def predict_large(
    model: str,
    strategy: str,
    tokens: int,
    checkpointing: bool = True,
    quantization: str = "nf4",
    rows: int = 1,
    cache: PredictionCache | None = None,
) -> MemoryBudget:
    """Return the prediction for `rows` pairs of `tokens`, half of them completion."""
    settings = {"gradient_checkpointing": checkpointing, "quantization": quantization}
    recipe, config = make_large_recipe(model, **settings), load_model_config(model)
    return predict_peak(config, recipe, strategy, sequence_tokens=tokens, rows=rows, cache=cache)


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
    for asked in tqdm(list(list_shipped()), unit="prediction"):
        predict_large(**asked, cache=collector)
    write_text_atomic(SHIPPED, format_shipped(collector.found))


def format_shipped(found: dict[str, dict[str, Any]]) -> str:
    """Return the file's text: JSON with a line per prediction, so that a change can be read."""
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in found.items())
    libraries = json.dumps(decisive_versions())
    return f'{{"libraries": {libraries}, "predictions": {{\n{rows}\n}}}}\n'


if __name__ == "__main__":
    main()
