"""One LoRA adapter on a base model: attach, save, fold for generation, check its gradients."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from hallulib.errors import GateFailed, HallulibError
from hallulib.files import display_path, storage_guard, write_json_atomic
from hallulib.recipe import Recipe

FOLD_LIMIT = 256 * 2**20
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def attach_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Put a new, trainable LoRA adapter "default" on a plain base model.

    B starts at zero, so the model's output is unchanged until the first step (Hu et al. 2021).
    Raises GateFailed when the model already carries an adapter: a second one on top would train,
    and be saved, without the first.
    """
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise GateFailed(
            "The model already has a LoRA adapter; a second one would be stacked on top of it.",
            "Load the existing adapter with load_policy(recipe, path, trainable=True) instead.",
        )
    config = LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.seed)
    return prepare_training(get_peft_model(model, config), recipe)


def prepare_training(model: PeftModel, recipe: Recipe) -> PeftModel:
    """Switch on what the recipe asks for in training: gradient checkpointing."""
    if recipe.model.gradient_checkpointing:
        # Non-reentrant, so that gradients reach the adapters although no input requires one.
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return model


def require_adapter(adapter_path: str | Path) -> None:
    """Raise HallulibError unless the folder holds a saved adapter."""
    missing = [name for name in ADAPTER_FILES if not (Path(adapter_path) / name).is_file()]
    if missing:
        raise HallulibError(
            f"{display_path(adapter_path)} holds no adapter ({', '.join(missing)} missing).",
            "Run the notebook that trains it again (02_sft or 05_sequential_dpo).",
        )


def save_adapter(model: PeftModel, folder: str | Path, recipe: Recipe) -> None:
    """Write the adapter "default" to `folder`, replacing what is there only once it is complete.

    The files name the base model as the recipe does (not by its place on this machine) and are
    the same bytes whenever the weights are.
    """
    folder = Path(folder)
    fresh, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    with storage_guard(folder):
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        # Without this flag peft looks the base model up on the hub at every save.
        model.save_pretrained(str(fresh), save_embedding_layers=False)
        for extra in set(os.listdir(fresh)) - set(ADAPTER_FILES):
            (fresh / extra).unlink()
        config = json.loads((fresh / ADAPTER_FILES[0]).read_text("utf-8"))
        config["base_model_name_or_path"] = recipe.model.name_or_path
        config["target_modules"] = sorted(config["target_modules"])
        write_json_atomic(fresh / ADAPTER_FILES[0], config)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def fold_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Within the block W + BA stands in for W, which makes generating a third faster (measured).

    Afterwards the very same weight tensors are back, bit for bit (unlike after peft's merge and
    unmerge). Quantised weights, and more than FOLD_LIMIT bytes of them, are left as they are.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and not m.disable_adapters]
    weights = [layer.get_base_layer().weight for layer in layers]
    foldable = all(weight.is_floating_point() for weight in weights)
    if not foldable or sum(w.numel() * w.element_size() for w in weights) > FOLD_LIMIT:
        yield
        return
    originals = [weight.data for weight in weights]
    try:
        for layer, weight in zip(layers, weights, strict=True):
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            delta = sum(layer.get_delta_weight(name) for name in names)
            weight.data = (weight.data + delta).to(weight.dtype)
            layer.merged_adapters = names
        yield
    finally:
        for layer, weight, original in zip(layers, weights, originals, strict=True):
            weight.data = original
            layer.merged_adapters = []


def lora_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the LoRA tensors by name."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def check_gradient_flow(model: torch.nn.Module) -> int:
    """After a backward pass: gradients have reached every LoRA tensor and nothing else.

    Returns the number of LoRA tensors. Raises GateFailed naming the first offender: a base weight
    that would be trained, a frozen or unreached LoRA tensor, or a B matrix whose gradient is zero
    (A's is zero by construction while B still is).
    """
    lora = lora_parameters(model)
    next_step = "Load the adapter with trainable=True and keep no_grad away from the policy."
    if not lora:
        raise GateFailed("The model has no LoRA tensors to train.", next_step)
    for name, parameter in model.named_parameters():
        if name not in lora and (parameter.requires_grad or parameter.grad is not None):
            raise GateFailed(f"The base weight {name} would be trained.", next_step)
    for name, parameter in lora.items():
        if not parameter.requires_grad:
            raise GateFailed(f"The LoRA tensor {name} is frozen.", next_step)
        if parameter.grad is None or (".lora_B" in name and not parameter.grad.any()):
            raise GateFailed(f"No gradient reaches the LoRA tensor {name}.", next_step)
    return len(lora)
