"""Exact parameter counts from a configuration alone: the model is built on the meta device, which
holds shapes and no numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from hallulib.errors import HallulibError
from hallulib.files import resolve_path
from hallulib.recipe import LoraSection

CONFIGS = Path(__file__).parent / "configs"
# Shapes that ship, so that the default course needs no network to speak of 8B models.
SHIPPED = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama-3-8b",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b",
}
# bitsandbytes: one scale per 64 weights; double quantisation stores the scales in 8 bits, with one
# fp32 scale per 256 of them. Each weight also has a 16-entry code table, with double quantisation
# a second one of 256 entries and an offset (QLoRA, Dettmers et al. 2023; bitsandbytes QuantState).
_BLOCK, _NESTED_BLOCK = 64, 256
_CODE_BYTES, _NESTED_CODE_BYTES, _OFFSET_BYTES = 16 * 4, 256 * 4, 4


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: `linear` is what quantisation packs (every linear layer but the head),
    `lora` the adapter's. `linear_shapes` lists (out, in) of the packed layers."""

    base: int
    linear: int
    lora: int
    linear_shapes: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        """Base and adapter, as `peft` prints it for an unquantised model."""
        return self.base + self.lora

    @property
    def packed_total(self) -> int:
        """What summing `numel` prints for an NF4 model: two packed weights count as one, so the
        trainable share comes out too high."""
        return self.total - self.linear // 2

    def base_bytes(self, quantization: str, dtype_bytes: int) -> int:
        """Bytes of the base weights; what is not packed stays in the computation's type."""
        packed = {"none": dtype_bytes, "int8": 1, "nf4": 0.5}[quantization]
        return int(self.linear * packed) + (self.base - self.linear) * dtype_bytes

    def constant_bytes(self, quantization: str) -> int:
        """Bytes of the quantisation constants (NF4: double quantisation; int8: a scale a row)."""
        if quantization == "int8":
            return 4 * sum(rows for rows, _ in self.linear_shapes)
        if quantization == "none":
            return 0
        total = 0
        for rows, columns in self.linear_shapes:
            blocks = math.ceil(rows * columns / _BLOCK)
            total += blocks + 4 * math.ceil(blocks / _NESTED_BLOCK)
            total += _CODE_BYTES + _NESTED_CODE_BYTES + _OFFSET_BYTES
        return total


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


def require_decoder(config: PretrainedConfig) -> None:
    """Raise HallulibError for an encoder such as BERT, or an encoder and decoder such as T5.

    transformers builds many of them under the head of a decoder, without a word: their attention
    looks ahead, so log-probabilities of what they "write" mean nothing.
    """
    looks_ahead = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if config.is_encoder_decoder or looks_ahead and not getattr(config, "is_decoder", False):
        raise HallulibError(
            f"A '{config.model_type}' configuration is that of an encoder, which writes no text.",
            "Give the configuration of a decoder such as Llama, Mistral or Qwen.",
        )


def count_parameters(config: PretrainedConfig, lora: LoraSection) -> ParameterCounts:
    """Count on the meta device; a second or less, whatever the size.

    Raises HallulibError when the configuration is not a decoder's or LoRA finds no such layers.
    """
    require_decoder(config)
    targets = lora.target_modules
    key = targets if isinstance(targets, str) else tuple(targets)
    return _count(type(config), json.dumps(config.to_dict(), sort_keys=True), lora.r, key)


@lru_cache(maxsize=64)
def _count(kind: type, config_json: str, r: int, targets: str | tuple[str, ...]) -> ParameterCounts:
    config = kind.from_dict(json.loads(config_json))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise HallulibError(
            f"'{config.model_type}' cannot be counted: {str(error).splitlines()[0][:200]}",
            "Give the configuration of a decoder, such as Llama, Mistral or Qwen.",
        ) from None
    head = model.get_output_embeddings()
    layers = {
        name: tuple(layer.weight.shape)
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and layer is not head
    }
    adapted = [shape for name, shape in layers.items() if _is_target(name, r, targets)]
    if not adapted:
        raise HallulibError(
            f"LoRA finds no layer called {targets} in '{config.model_type}'.",
            f"Use all-linear, or names such as {', '.join(_leaf_names(layers))}.",
        )
    shapes = tuple(layers.values())
    return ParameterCounts(
        base=sum(parameter.numel() for parameter in model.parameters()),
        linear=sum(rows * columns for rows, columns in shapes),
        lora=sum(r * (rows + columns) for rows, columns in adapted),
        linear_shapes=shapes,
    )


def _is_target(name: str, r: int, targets: str | tuple[str, ...]) -> bool:
    """Whether LoRA adapts the layer, by peft's own matching (injecting it would take seconds)."""
    if targets == "all-linear":
        return True
    names = targets if isinstance(targets, str) else list(targets)
    return bool(check_target_module_exists(LoraConfig(r=r, target_modules=names), name))


def _leaf_names(layers: dict[str, tuple]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in layers})
