"""Before a stage: does its prediction fit into what is free now? Called by notebook and CLI."""

from __future__ import annotations

import json

import psutil
import torch

from hallulib.errors import HallulibError
from hallulib.files import write_json_atomic
from hallulib.memory.budget import MEASURED_STAGES, pick_budget_device, read_longest
from hallulib.memory.counts import load_model_config
from hallulib.memory.peak import GIB, MemoryBudget, predict_peak
from hallulib.recipe import Recipe
from hallulib.run import Run


def check_fits(recipe: Recipe, run: Run, stage: str, force: bool = False) -> MemoryBudget | None:
    """Predict the stage's peak on the longest rows and compare it with the free memory.

    Returns the prediction (None for a stage that has none). Raises HallulibError, saying what to
    change, when it does not fit, unless `force`.
    """
    strategy = MEASURED_STAGES.get(stage)
    if strategy is None:
        return None
    audit = json.loads(run.require("data/audit.json").read_text("utf-8"))
    tokens, device = read_longest(recipe, audit), pick_budget_device(recipe)
    config = load_model_config(recipe.model.name_or_path, recipe.model.revision)
    budget = predict_peak(
        config, recipe, strategy, sequence_tokens=tokens["sequence"],
        completion_tokens=tokens["completion"], device=device,
    )  # fmt: skip
    free = read_free_bytes(device)
    wanted, advice = budget.needed, _advise(budget, stage)
    # For the manifest, and should it run out of memory all the same.
    predicted = {"needed": wanted, "allocated": budget.allocated, "reserved": budget.reserved}
    write_json_atomic(run.path(f"budget/{stage}.json"), predicted | {"advice": advice})
    if wanted <= free or force:
        return budget
    raise HallulibError(
        f"{stage} would need {wanted / GIB:.1f} GiB on its longest rows ({tokens['sequence']} "
        f"tokens, {budget.method}), most of it {budget.largest.replace('_', ' ')}; "
        f"{free / GIB:.1f} GiB are free.",
        f"{advice} `python -m hallulib plan` finds what fits; --force starts anyway.",
    )


def read_free_bytes(device: str) -> int:
    """Free memory now: of the GPU, which other programs share, else of the machine."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _advise(budget: MemoryBudget, section: str) -> str:
    advice = {
        "base_weights": "Set model.quantization=nf4.",
        "activations": "Set model.gradient_checkpointing=true, or lower model.max_length.",
        "logits": f"Lower {section}.batch_size.",
    }
    if not budget.checkpointing and budget.largest == "temporaries":
        return advice["activations"]
    return advice.get(budget.largest, f"Lower {section}.batch_size or model.max_length.")
