"""The memory stage: every strategy predicted, written down, and held against what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from hallulib.errors import DataError, HallulibError
from hallulib.files import display_path, write_json_atomic
from hallulib.memory.passes import STRATEGIES, runs_on_cuda, trace_pass
from hallulib.memory.peak import GIB, MemoryBudget, make_shape, predict_peak
from hallulib.recipe import Recipe, load_recipe
from hallulib.run import Run, stage

OUTPUT = "budget/budget.json"
# Which prediction stands beside which measured stage.
MEASURED_STAGES = {
    "sft": "sft",
    "pairs": "generation",
    "reference": "cached_reference_pass1",
    "dpo": "cached_reference_pass2",
}
COMPARED = [name for name, s in STRATEGIES.items() if s.runs in ("dpo", "reference")]
LARGE = "meta-llama/Meta-Llama-3-8B-Instruct"  # the case's model, on rows of 512 tokens


def load_budget(run: Run) -> dict[str, list[MemoryBudget]]:
    """Return the predictions as written. Raises MissingArtifact before notebook 03."""
    found = json.loads(run.require(OUTPUT).read_text("utf-8"))
    return {name: [MemoryBudget(**row) for row in rows] for name, rows in found.items()}


@stage("memory", load=load_budget)
def predict_budget(recipe: Recipe, run: Run) -> dict[str, list[MemoryBudget]]:
    """Predict every strategy and write budget/budget.json: `own`, for the recipe's model on the
    longest rows of data/audit.json, and `large`, live bytes of Llama-3-8B in NF4 and bf16 on one
    pair of 512 tokens."""
    lengths = read_lengths(recipe, run.require("data/audit.json"))[0]
    names = tqdm(STRATEGIES, desc="predicting this run", unit="strategy")
    own = [predict_peak(recipe, name, **lengths) for name in names]
    names = tqdm(COMPARED, desc="predicting Llama-3-8B", unit="strategy")
    large = [predict_large(LARGE, name, 512) for name in names]
    rows = {"own": [asdict(b) for b in own], "large": [asdict(b) for b in large]}
    write_json_atomic(run.path(OUTPUT), rows)
    return {"own": own, "large": large}


def predict_large(
    model: str, strategy: str, tokens: int, *, rows: int = 1, quantization: str = "nf4",
    checkpointing: bool = True, replay: bool = False,
) -> MemoryBudget:  # fmt: skip
    """Return the prediction for `rows` pairs of `tokens`, half of them completion, on a GPU: bf16,
    LoRA r=16 on all linear layers. Live bytes take a second, `replay` some more."""
    settings = {"quantization": quantization, "gradient_checkpointing": checkpointing}
    recipe = load_recipe("llama3-8b-12gb", {"model": {"name_or_path": model} | settings})
    return predict_peak(recipe, strategy, rows=rows, tokens=tokens, replay=replay)


def read_lengths(recipe: Recipe, audit: Path | None) -> tuple[dict[str, int], str]:
    """Return `tokens` of the longest row and `completion` of the longest reference in an audit, cut
    at max_length, and where they come from; without an audit, max_length and half of it. Raises
    DataError for an audit that does not say."""
    limit = recipe.model.max_length
    if audit is None:
        return {"tokens": limit, "completion": limit // 2}, "model.max_length"
    try:
        train = json.loads(audit.read_text("utf-8"))["splits"]["train"]
        tokens = min(int(train["total_tokens"]["max"]), limit)
        completion = min(int(train["reference_tokens"]["max"]), tokens)
    except (OSError, ValueError, KeyError, TypeError):
        what = f"{display_path(audit)} holds no token counts."
        raise DataError(what, "Run notebook 01_data_prep, which writes data/audit.json.") from None
    return {"tokens": tokens, "completion": completion}, "longest training rows in data/audit.json"


def check_on_this_machine(
    recipe: Recipe, strategy: str, tokens: int, completion: int
) -> tuple[MemoryBudget, int]:
    """Return the prediction for one pass of two rows or pairs, and what the recipe's real model was
    seen to take: bytes of live tensors, by the same tracker, on the CPU. They must be equal."""
    on_cpu = recipe.model.model_copy(update={"device": "cpu"})
    recipe, plan = recipe.model_copy(update={"model": on_cpu}), STRATEGIES[strategy]
    asked = {"rows": 2, "tokens": tokens, "completion": completion}
    trace = trace_pass(recipe, plan, make_shape(recipe, plan, **asked))
    return predict_peak(recipe, strategy, **asked), trace.find_peak()


def check_fits(recipe: Recipe, run: Run, stage: str, force: bool = False) -> MemoryBudget | None:
    """Predict the stage's peak on the longest rows, write it to budget/<stage>.json, and compare it
    with the free memory. Raises HallulibError, saying what to change, when it does not fit or
    cannot be predicted; `force` returns the prediction, or None, instead."""
    lengths, _ = read_lengths(recipe, run.require("data/audit.json"))
    try:
        budget = predict_peak(recipe, MEASURED_STAGES[stage], **lengths)
    except HallulibError:
        if force:
            return None
        raise
    free, advice = read_free_bytes(recipe), _advise(budget, recipe, stage)
    sizes = {name: getattr(budget, name) for name in ("needed", "allocated", "reserved")}
    told = {"advice": advice, "stage_key": run.stage_key(stage, recipe)}
    write_json_atomic(run.path(f"budget/{stage}.json"), sizes | told)
    if budget.needed > free and not force:
        raise HallulibError(
            f"{stage} would need {budget.needed / GIB:.1f} GiB on rows of {budget.tokens} tokens, "
            f"most of it {budget.largest}; {free / GIB:.1f} GiB are free.",
            f"{advice} `python -m hallulib plan` finds what fits; --force starts anyway.",
        )
    return budget


def read_free_bytes(recipe: Recipe) -> int:
    """Return the free memory now: of the GPU, which other programs share, else of the machine."""
    if runs_on_cuda(recipe) and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _advise(budget: MemoryBudget, recipe: Recipe, section: str) -> str:
    if budget.largest == "base weights" and recipe.model.quantization != "nf4":
        return "Set model.quantization=nf4."
    if budget.largest in ("activations", "temporaries") and not recipe.model.gradient_checkpointing:
        return "Set model.gradient_checkpointing=true, or lower model.max_length."
    return f"Lower {section}.batch_size or model.max_length."


def compare_with_measured(run: Run) -> pd.DataFrame:
    """Return one row for each finished stage that was predicted before it ran: bytes `predicted`
    and `measured` by a GPU's allocator, and `error` (predicted / measured - 1). On a CPU `measured`
    is empty, and `resident` is what the whole process grew to, libraries included."""
    rows = []
    for name in MEASURED_STAGES:
        record, path = run.manifest["stages"].get(name), run.path(f"budget/{name}.json")
        expected = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if record is None or expected.get("stage_key") != record["key"]:
            continue  # not predicted, or for other settings
        seen = [record["peak_memory_bytes"], float("nan")]
        measured, resident = reversed(seen) if record["device"] == "cpu" else seen
        rows.append((name, expected["allocated"], measured, resident, record["device"]))
    names = ["stage", "predicted", "measured", "resident", "device"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(error=table["predicted"].astype(float) / table["measured"] - 1)
