"""Runs in which everything before DPO is finished, and ways to interrupt a training."""

import shutil

import torch
from safetensors.torch import load_file
from tiny_model import copy_sft_run, make_recipe, record_pairs, shared_folder

from hallulib.checkpoints import Log
from hallulib.dpo.reference import cache_reference
from hallulib.run import Run


class Interrupted(Exception):
    """Stands for a power cut."""


def stop_at(monkeypatch, step: int, folder: str = "") -> None:
    """Raise when an optimiser step is over, before it is logged or saved; `folder`: in which the
    training keeps its checkpoints, if it is to be that one only."""
    original = Log.write

    def write(self, at, values):
        if at == step and "grad_norm" in values and folder in str(self.folder):
            raise Interrupted
        return original(self, at, values)

    monkeypatch.setattr(Log, "write", write)


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


def weights(run, where: str = "dpo/adapter") -> dict[str, torch.Tensor]:
    return load_file(run.path(where) / "adapter_model.safetensors")


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
