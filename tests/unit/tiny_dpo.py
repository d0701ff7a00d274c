"""Runs in which everything before DPO is finished, and ways to interrupt the training."""

from __future__ import annotations

import shutil

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_model import copy_sft_run, make_recipe, record_pairs, shared_folder

from hallulib.dpo.batching import load_pairs
from hallulib.dpo.reference import ReferenceCache, cache_reference
from hallulib.dpo.step import Arm
from hallulib.dpo.trainer import SequentialDPOTrainer
from hallulib.metrics_log import MetricsLog
from hallulib.models import load_policy, load_tokenizer
from hallulib.run import Run

BOTH = Arm("dpo", preference=True, sft_weight=1.0)


class Interrupted(Exception):
    """Stands for a power cut."""


def stop_at(monkeypatch, step: int, label: str = "dpo") -> None:
    original = MetricsLog.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step and self.label == label:
            raise Interrupted
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(MetricsLog, "on_step_end", on_step_end)


def reference_run(folder, overrides=None):
    """A recipe and a run of its own in which everything before DPO is finished."""
    source, recipe = shared_folder() / "reference_run", make_recipe()
    if not source.exists():
        run = copy_sft_run(source, recipe)
        record_pairs(run, recipe)
        cache_reference(recipe, run)
    shutil.copytree(source, folder)
    recipe = make_recipe(overrides)
    return recipe, Run.open(folder, recipe)


def build_trainer(recipe, run, folder, arm=BOTH, policy=None, shift: float = 0.0):
    """The trainer as `train_arm` builds it, with a reference that can be made wrong."""
    tokenizer = load_tokenizer(recipe)
    policy = policy or load_policy(recipe, run.require("sft/adapter"), trainable=True)
    cache = ReferenceCache.open(run.require("reference"), recipe.model, policy, tokenizer)
    cache.rows = {a: (c + np.float32(shift), r) for a, (c, r) in cache.rows.items()}
    parts = [load_pairs(run, s, tokenizer, recipe.model).pairs for s in ("train", "validation")]
    return SequentialDPOTrainer(policy, recipe, arm, folder, cache, parts, tokenizer.pad_token_id)


def weights(run, where: str = "dpo/adapter") -> dict[str, torch.Tensor]:
    return load_file(run.path(where) / "adapter_model.safetensors")
