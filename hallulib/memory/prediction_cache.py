"""Predictions that were made before, found again by the hash of all that decides them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from hallulib.errors import HallulibError
from hallulib.files import resolve_path, sha256_text, write_json_atomic
from hallulib.provenance import STAGES, hash_code, library_versions
from hallulib.recipe import Recipe

FOLDER = "outputs/.predictions"
# Made by `python -m hallulib.memory.table`: the large models, so that no reader waits for them.
SHIPPED = Path(__file__).parent / "predictions.json"
# Of the libraries, these decide what is alive when.
DECISIVE = ("torch", "transformers", "peft")


class PredictionCache:
    """One small file per prediction below `folder`; `shipped` is looked at first."""

    def __init__(self, folder: Path, shipped: Mapping[str, Any] | None = None) -> None:
        self.folder, self.shipped = folder, shipped or {}

    @classmethod
    def default(cls) -> PredictionCache:
        """The cache of this project, with the predictions that ship."""
        return cls(resolve_path(FOLDER), read_shipped())

    def make_key(self, config: PretrainedConfig, recipe: Recipe, *parts: Mapping[str, Any]) -> str:
        """sha256 of the model's shape, the settings that decide memory, and library versions.

        Weights do not count, nor what the model is called. The code counts for what this machine
        computed; a test recomputes what ships.
        """
        shape = config.to_dict()
        for name in ("_name_or_path", "architectures", "transformers_version", "dtype"):
            shape.pop(name, None)
        model = recipe.model.model_dump(include=set(_MODEL_FIELDS))
        lora = recipe.lora.model_dump(include={"r", "target_modules"})
        loss = recipe.dpo.model_dump(include={"loss", "sft_weight"})
        steps = [section.gradient_accumulation > 1 for section in (recipe.sft, recipe.dpo)]
        samples = recipe.pairs.samples_per_note
        versions = decisive_versions()
        values = [shape, model, lora, loss, steps, samples, versions, *parts]
        return sha256_text(json.dumps(values, sort_keys=True, default=str))

    def get(self, key: str) -> dict[str, Any] | None:
        """The prediction of that key, or None. A file that cannot be read counts as none."""
        if key in self.shipped:
            return self.shipped[key]
        try:
            return json.loads(self._place(key).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, key: str, values: dict[str, Any]) -> None:
        """Keep a prediction. A disk that cannot take it is no reason to stop."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._place(key), values)
        except (OSError, HallulibError):
            return

    def _place(self, key: str) -> Path:
        return self.folder / f"{sha256_text(key + _code_stamp())[:32]}.json"


def decisive_versions() -> dict[str, str]:
    """Versions of the libraries that decide a prediction; +cpu or +cu130 make no difference."""
    return {name: library_versions()[name].partition("+")[0] for name in DECISIVE}


_MODEL_FIELDS = ("quantization", "dtype", "attention", "gradient_checkpointing")


def _code_stamp() -> str:
    """Changes with the sources that decide a prediction (an edit in a living kernel is seen)."""
    return hash_code(STAGES["memory"])


@cache
def read_shipped() -> dict[str, Any]:
    """The predictions that ship with the package, by key; none where the file is missing."""
    if not SHIPPED.is_file():
        return {}
    return json.loads(SHIPPED.read_text("utf-8"))["predictions"]
