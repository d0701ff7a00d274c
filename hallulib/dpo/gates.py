"""Checks that always run before DPO trains: each names what is wrong, none can be switched off."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from hallulib.dpo.batching import TokenPair
from hallulib.errors import GateFailed
from hallulib.models import ADAPTER_FILES, lora_parameters

# How far the first loss may be from ln 2, and a margin from 0: rounding between the shapes of the
# reference pass and of the first batch. A wrong reference is off by 0.04 (measured) and more.
START_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}


def check_pairs(pairs: Sequence[TokenPair]) -> None:
    """Both completions of every pair say something, and not the same."""
    for number, pair in enumerate(pairs):
        # One token is the end token alone.
        empty = len(pair.chosen_ids) < 2 or len(pair.rejected_ids) < 2 or not pair.prompt_ids
        if empty or pair.chosen_ids == pair.rejected_ids:
            what = "an empty prompt or side" if empty else "two identical completions"
            advice = "Make the pairs again with notebook 04_reference_cache."
            raise GateFailed(f"Pair {number} has {what}.", advice)


def check_scored_tokens(batch: dict[str, torch.Tensor], pairs: Sequence[TokenPair]) -> None:
    """Every completion token is scored, each from the token before it, and no prompt token is."""
    counts = batch["counts"].tolist()
    targets = batch["targets"].split(counts)
    readers = batch["input_ids"].flatten()[batch["predictors"]].split(counts)
    expected = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    expected += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    for row, (prompt, ids) in enumerate(expected):
        if targets[row].tolist() != ids or readers[row].tolist() != [prompt[-1], *ids[:-1]]:
            what = f"Completion {row} of the first batch is not scored exactly."
            raise GateFailed(what, "This is a fault of dpo/batching.py, not of the data.")


def check_single_adapter(model: torch.nn.Module) -> None:
    """The SFT adapter is reused: one adapter, named "default", and no LoRA layer within another."""
    next_step = "Load the policy with load_policy(recipe, sft_adapter, trainable=True), once."
    names = list(getattr(model, "peft_config", {}))
    if not isinstance(model, PeftModel) or names != ["default"]:
        raise GateFailed(f"The policy carries the adapters {names}, not one 'default'.", next_step)
    for name, module in model.named_modules():
        nested = isinstance(module, LoraLayer) and isinstance(module.base_layer, LoraLayer)
        if nested or (isinstance(module, PeftModel) and module is not model):
            raise GateFailed(f"There is a LoRA layer within the LoRA layer {name}.", next_step)


def check_adapter_file(model: PeftModel, adapter: str | Path) -> int:
    """Every LoRA tensor of the policy comes from the SFT adapter's file; returns their number."""
    saved = load_file(Path(adapter) / ADAPTER_FILES[1])
    live = {name.replace(".default.", "."): p for name, p in lora_parameters(model).items()}
    for name in sorted(set(saved) | set(live)):
        there = name in saved and name in live
        if not there or not torch.equal(saved[name].to(live[name]), live[name].detach()):
            what = f"The policy's LoRA tensor {name} is not the SFT adapter's."
            raise GateFailed(what, "Load the policy from sft/adapter; add no fresh adapter.")
    return len(live)


def check_start(losses: torch.Tensor, margins: torch.Tensor, dtype: str) -> None:
    """Before the first step policy and reference are the same: loss ln 2 and every margin 0.

    Anything else means that the cached reference is not this policy's: another adapter, dtype,
    template or truncation, or dropout in one of the passes.
    """
    loss, margin, limit = losses.mean().item(), margins.abs().max().item(), START_TOLERANCE[dtype]
    if not (abs(loss - math.log(2)) <= limit and margin <= 4 * limit):
        raise GateFailed(
            f"Before the first step the DPO loss is {loss:.4f}, not ln 2 = 0.6931, and the largest "
            f"margin is {margin:.4f}, not 0: the reference is not this policy's.",
            "Run notebook 04_reference_cache again, with the same recipe and SFT adapter.",
        )
