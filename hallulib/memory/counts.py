"""Configurations without weights, and exact parameter counts from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from hallulib.errors import HallulibError
from hallulib.files import resolve_path
from hallulib.memory.skeleton import build_skeleton
from hallulib.recipe import Recipe

CONFIGS = Path(__file__).parent / "configs"
# Shapes that ship, so that the default course needs no network to speak of 8B models.
SHIPPED = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3-8b",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b",
}


class ParameterCounts(NamedTuple):
    """Numbers of parameters: `linear` is the part of `base` that quantisation packs (every linear
    layer but the head), `lora` the adapter's."""

    base: int
    linear: int
    lora: int

    @property
    def total(self) -> int:
        """Base and adapter, as `peft` prints it for an unquantised model."""
        return self.base + self.lora

    @property
    def packed_total(self) -> int:
        """What summing `numel` prints for an NF4 model: two packed weights count as one, so the
        trainable share comes out too high."""
        return self.total - self.linear // 2


def load_model_config(name_or_path: str, revision: str = "main") -> PretrainedConfig:
    """The configuration of a local folder, of a shape that ships ("llama-3-8b" or its hub id), or
    of a hub model. Raises HallulibError when there is none."""
    shipped = CONFIGS / f"{SHIPPED.get(name_or_path, name_or_path)}.json"
    if shipped.is_file():
        return AutoConfig.for_model(**json.loads(shipped.read_text("utf-8")))
    folder = resolve_path(name_or_path)
    try:
        if folder.is_dir():
            return AutoConfig.from_pretrained(folder)
        return AutoConfig.from_pretrained(name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        raise HallulibError(
            f"No configuration of '{name_or_path}' was found ({str(error).splitlines()[0]}).",
            "Give a folder with a config.json, a hub id (needs the network once), or one of "
            f"{', '.join(sorted(SHIPPED.values()))}.",
        ) from None


def count_parameters(config: PretrainedConfig, recipe: Recipe) -> ParameterCounts:
    """Count the recipe's adapter on a model of this shape; no weight is made.

    Raises HallulibError when the configuration is not a decoder's or LoRA finds no such layers.
    """
    model = build_skeleton(config, recipe)
    head = model.get_base_model().get_output_embeddings()
    parts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        parts["lora_" in name] += parameter.numel()
    linear = sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head and "lora_" not in name
    )
    return ParameterCounts(parts[False], linear, parts[True])
