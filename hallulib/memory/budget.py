"""The memory stage: every strategy predicted, written down, and held against what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from hallulib.errors import HallulibError
from hallulib.files import write_json_atomic
from hallulib.memory.counts import load_model_config
from hallulib.memory.passes import STRATEGIES, find_strategy, trace_real
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
COMPARED = tuple(s.name for s in STRATEGIES.values() if s.runs in ("dpo", "reference"))
# The case's model, and the length of its rows.
LARGE, LARGE_TOKENS = "meta-llama/Meta-Llama-3-8B-Instruct", 512


@dataclass(frozen=True)
class BudgetResult:
    """`own`: the recipe's model on its longest rows, whose `lengths` say where they come from;
    `large`: live bytes of Llama-3-8B."""

    lengths: dict[str, Any]
    own: list[MemoryBudget]
    large: list[MemoryBudget]
    notes: dict[str, Any] = field(default_factory=dict)


def load_budget_result(run: Run) -> BudgetResult:
    """The predictions as written. Raises MissingArtifact before notebook 03."""
    values = json.loads(run.require(OUTPUT).read_text("utf-8"))
    for name in ("own", "large"):
        values[name] = [MemoryBudget(**row) for row in values[name]]
    return BudgetResult(**values)


@stage("memory", load=load_budget_result)
def predict_budget(recipe: Recipe, run: Run) -> BudgetResult:
    """Predict every strategy for the recipe's model, on the longest rows of data/audit.json, and
    the live bytes of Llama-3-8B (one pair of 512 tokens, NF4, bf16); write budget/budget.json."""
    lengths = read_lengths(recipe, json.loads(run.require("data/audit.json").read_text("utf-8")))
    names = tqdm(STRATEGIES, desc="predicting this run", unit="strategy")
    own = [_predict_own(recipe, name, lengths) for name in names]
    names = tqdm(COMPARED, desc="predicting Llama-3-8B", unit="strategy")
    large = [predict_large(LARGE, name, LARGE_TOKENS) for name in names]
    result = BudgetResult(lengths, own, large, {b.strategy: b.total for b in own})
    write_json_atomic(run.path(OUTPUT), asdict(result))
    return result


def _predict_own(recipe: Recipe, strategy: str, lengths: dict[str, Any]) -> MemoryBudget:
    config = load_model_config(recipe.model.name_or_path, recipe.model.revision)
    tokens, completion = lengths["sequence"], lengths["completion"]
    return predict_peak(
        config, recipe, strategy, tokens=tokens, completion=completion, device=_pick_device(recipe)
    )


def _pick_device(recipe: Recipe) -> str:
    """A GPU is predicted where the recipe asks for one, or leaves the choice and one is here."""
    if recipe.model.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return recipe.model.device


def predict_large(
    model: str, strategy: str, tokens: int, *, rows: int = 1, quantization: str = "nf4",
    checkpointing: bool = True, replay: bool = False,
) -> MemoryBudget:  # fmt: skip
    """Return the prediction for `rows` pairs of `tokens`, half of them completion, on a GPU: bf16,
    LoRA r=16 on all linear layers. Live bytes take a second, `replay` some more."""
    settings = {
        "name_or_path": model, "quantization": quantization, "dtype": "bfloat16",
        "gradient_checkpointing": checkpointing,
    }  # fmt: skip
    recipe = load_recipe("llama3-8b-12gb", {"model": settings})
    config = load_model_config(model)
    return predict_peak(config, recipe, strategy, rows=rows, tokens=tokens, replay=replay)


def read_lengths(recipe: Recipe, audit: dict[str, Any]) -> dict[str, Any]:
    """Longest row and longest reference of the audit, cut at max_length; max_length and half of it
    where the audit does not say."""
    limit = recipe.model.max_length
    train = audit.get("splits", {}).get("train", {})
    total = train.get("total_tokens", {}).get("max")
    reference = train.get("reference_tokens", {}).get("max")
    if total is None or reference is None:
        return {"sequence": limit, "completion": limit // 2, "source": "model.max_length"}
    sequence = min(int(total), limit)
    source = "longest training rows in data/audit.json"
    return {"sequence": sequence, "completion": min(int(reference), sequence), "source": source}


def check_on_this_machine(
    recipe: Recipe, strategy: str, tokens: int, completion: int
) -> tuple[MemoryBudget, int]:
    """Return the prediction for one pass of two rows or pairs, and what the recipe's real model was
    seen to take: bytes of live tensors, by the same tracker, on the CPU. They must be equal."""
    on_cpu = recipe.model.model_copy(update={"device": "cpu"})
    recipe = recipe.model_copy(update={"model": on_cpu})
    config = load_model_config(recipe.model.name_or_path, recipe.model.revision)
    asked = {"rows": 2, "tokens": tokens, "completion": completion}
    budget = predict_peak(config, recipe, strategy, **asked, device="cpu")
    plan = find_strategy(strategy)
    trace = trace_real(recipe, plan, make_shape(config, recipe, plan, (2, tokens, completion)))
    return budget, trace.find_peak()[0]


def check_fits(recipe: Recipe, run: Run, stage: str, force: bool = False) -> MemoryBudget | None:
    """Predict the stage's peak on the longest rows, write it to budget/<stage>.json, and compare it
    with the free memory.

    Returns the prediction (None for a stage that has none). Raises HallulibError, saying what to
    change, when it does not fit or cannot be predicted, unless `force`.
    """
    if stage not in MEASURED_STAGES:
        return None
    lengths = read_lengths(recipe, json.loads(run.require("data/audit.json").read_text("utf-8")))
    try:
        budget = _predict_own(recipe, MEASURED_STAGES[stage], lengths)
    except HallulibError:
        if force:
            return None
        raise
    free, advice = read_free_bytes(_pick_device(recipe)), _advise(budget, recipe, stage)
    sizes = {"needed": budget.needed, "allocated": budget.allocated, "reserved": budget.reserved}
    told = {"advice": advice, "stage_key": run.stage_key(stage, recipe)}
    write_json_atomic(run.path(f"budget/{stage}.json"), sizes | told)
    if budget.needed > free and not force:
        raise HallulibError(
            f"{stage} would need {budget.needed / GIB:.1f} GiB on its longest rows "
            f"({lengths['sequence']} tokens), most of it {budget.largest.replace('_', ' ')}; "
            f"{free / GIB:.1f} GiB are free.",
            f"{advice} `python -m hallulib plan` finds what fits; --force starts anyway.",
        )
    return budget


def read_free_bytes(device: str) -> int:
    """Free memory now: of the GPU, which other programs share, else of the machine."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _advise(budget: MemoryBudget, recipe: Recipe, section: str) -> str:
    if budget.largest == "base_weights" and recipe.model.quantization != "nf4":
        return "Set model.quantization=nf4."
    recomputes = recipe.model.gradient_checkpointing
    if budget.largest in ("activations", "temporaries") and not recomputes:
        return "Set model.gradient_checkpointing=true, or lower model.max_length."
    return f"Lower {section}.batch_size or model.max_length."


def compare_with_measured(run: Run) -> pd.DataFrame:
    """Return one row for each finished stage that was predicted before it ran: bytes `predicted`
    and `measured`, and `error` (predicted / measured - 1).

    Measured is what a GPU's allocator gave out. A CPU does not count tensors: there `measured` is
    empty, and `resident` is what the whole process grew to, libraries included.
    """
    rows = []
    for name in MEASURED_STAGES:
        record, path = run.manifest["stages"].get(name), run.path(f"budget/{name}.json")
        expected = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if record is None or expected.get("stage_key") != record["key"]:
            continue  # not predicted, or for other settings
        kind = "resident" if record["device"] == "cpu" else "measured"
        row = {"stage": name, "predicted": expected["allocated"], "device": record["device"]}
        rows.append(row | {kind: record["peak_memory_bytes"]})
    names = ["stage", "predicted", "measured", "resident", "device"]
    table = pd.DataFrame(rows, columns=names).astype({"measured": float, "resident": float})
    return table.assign(error=table["predicted"].astype(float) / table["measured"] - 1)
