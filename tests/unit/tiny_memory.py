"""Small shapes whose memory is predicted: a configuration alone, and a recipe that names it."""

import tempfile
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from hallulib.recipe import Recipe, load_recipe

SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "pad_token_id": 0,
}  # fmt: skip


def make_config(kind="llama", **changes) -> PretrainedConfig:
    """A small decoder of that family."""
    return AutoConfig.for_model(kind, **SMALL | changes)


def recipe_of(config: PretrainedConfig, changes=None, device: str = "cuda") -> Recipe:
    """The small recipe, on a model of this shape that has no weights."""
    folder = tempfile.mkdtemp(dir=Path(tempfile.gettempdir()))
    config.save_pretrained(folder)
    named = {"model.name_or_path": folder, "model.device": device}
    return load_recipe("tiny-cpu", named | (changes or {}))
