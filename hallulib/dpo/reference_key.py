"""What a cached log-probability depends on: the key of the reference cache, field by field."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hallulib.files import sha256_text
from hallulib.recipe import Recipe

SCHEMA = 2  # of the shards; other shards are left alone


def fingerprint_reference(
    recipe: Recipe, policy: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return all that moves a log-prob, by name; their hash is the cache's key.

    Weights are hashed as they are in memory, so it does not matter whether they came from a
    folder or the hub, nor what the folder is called. Learning rate, beta and seed are not in it.
    """
    adapter = {n: t for n, t in policy.state_dict().items() if "lora_" in n}
    base = {n: t for n, t in policy.state_dict().items() if "lora_" not in n}
    config = policy.peft_config["default"]
    return {
        "schema": SCHEMA,
        "base_weights": _hash_tensors(base),
        "adapter_weights": _hash_tensors(adapter),
        "adapter_scale": f"{config.lora_alpha}/{config.r}",
        "tokenizer": _hash_tokenizer(tokenizer),
        "chat_template": sha256_text(str(tokenizer.chat_template)),
        "max_length": recipe.model.max_length,
        "truncation_side": recipe.model.truncation_side,
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
        "quantization": recipe.model.quantization,
    }


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call; they add padding or cut, neither of which is scored.
    for name in ("padding", "truncation"):
        state.pop(name, None)
    return sha256_text(json.dumps(state, sort_keys=True))


def _hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_fields(fields: dict[str, Any]) -> str:
    """Return the key of these fields: sha256, hexadecimal."""
    return sha256_text(json.dumps(fields, sort_keys=True))
