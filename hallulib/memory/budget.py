"""The memory stage: every strategy predicted, written down, and held against what was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from hallulib.files import write_json_atomic
from hallulib.memory.counts import load_model_config
from hallulib.memory.peak import MemoryBudget, Question, change_recipe, make_shape, predict_peak
from hallulib.memory.strategies import STRATEGIES, find_strategy
from hallulib.memory.table import CARDS_GB, list_large, predict_large
from hallulib.memory.tracing import trace_real
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage

OUTPUT = "budget/budget.json"
# Which prediction stands beside which measured stage.
MEASURED_STAGES = {
    "sft": "sft",
    "pairs": "generation",
    "reference": "cached_reference_pass1",
    "dpo": "cached_reference_pass2",
}


@dataclass(frozen=True)
class BudgetResult:
    """`own`: the recipe's model on its longest rows; `shapes`: the large models at fixed lengths.

    `tokens` says which lengths `own` was computed for and where they come from.
    """

    card_gb: float
    device: str
    tokens: dict[str, Any]
    own: list[MemoryBudget]
    shapes: list[MemoryBudget]
    notes: dict[str, Any] = field(default_factory=dict)

    def find(
        self, model: str, strategy: str, sequence_tokens: int, checkpointing: bool = True
    ) -> MemoryBudget:
        """One prediction for a large model. Raises KeyError when it was not made."""
        wanted = (model, strategy, sequence_tokens, checkpointing)
        for b in self.shapes:
            if (b.model, b.strategy, b.sequence_tokens, b.checkpointing) == wanted:
                return b
        raise KeyError(wanted)


def load_budget_result(run: Run) -> BudgetResult:
    """The predictions as written. Raises MissingArtifact before notebook 03."""
    values = json.loads(run.require(OUTPUT).read_text("utf-8"))
    own = [MemoryBudget.from_dict(row) for row in values["own"]]
    shapes = [MemoryBudget.from_dict(row) for row in values["shapes"]]
    return BudgetResult(
        values["card_gb"], values["device"], values["tokens"], own, shapes, values["notes"]
    )


@stage("memory", load=load_budget_result)
def predict_budget(recipe: Recipe, run: Run) -> BudgetResult:
    """Predict every strategy for the recipe's model, on the longest rows of data/audit.json, and
    for the large models at 512, 1024 and 2048 tokens (batch of one pair, NF4, bf16); write
    budget/budget.json."""
    device = pick_budget_device(recipe)
    tokens = read_longest(recipe, json.loads(run.require("data/audit.json").read_text("utf-8")))
    config = load_model_config(recipe.model.name_or_path, recipe.model.revision)
    own = [
        predict_peak(
            config, recipe, name, sequence_tokens=tokens["sequence"],
            completion_tokens=tokens["completion"], device=device,
        )
        for name in tqdm(STRATEGIES, desc="predicting this run", unit="strategy")
    ]
    large = list(list_large())
    shapes = [predict_large(**asked) for asked in tqdm(large, desc="large models", delay=2)]
    notes = {"method": own[0].method, **{b.strategy: b.total for b in own}}
    result = BudgetResult(recipe.memory.card_gb, device, tokens, own, shapes, notes)
    _write(run, result)
    return result


def pick_budget_device(recipe: Recipe) -> str:
    """ "cuda" where the recipe asks for it, or leaves the choice and a GPU is here; else "cpu"."""
    wanted = recipe.model.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def read_longest(recipe: Recipe, audit: dict[str, Any]) -> dict[str, Any]:
    """Longest row and longest reference of the audit, cut at max_length; max_length and half of it
    where the audit does not say."""
    limit = recipe.model.max_length
    train = audit.get("splits", {}).get("train", {})
    total = train.get("total_tokens", {}).get("max")
    reference = train.get("reference_tokens", {}).get("max")
    if total is None or reference is None:
        return {"sequence": limit, "completion": limit // 2, "source": "model.max_length"}
    sequence = min(int(total), limit)
    return {
        "sequence": sequence,
        "completion": min(int(reference), sequence),
        "source": "longest training rows in data/audit.json",
    }


def _write(run: Run, result: BudgetResult) -> None:
    def rows(budgets: list[MemoryBudget]) -> list[dict[str, Any]]:
        cards = (result.card_gb, *CARDS_GB)
        return [b.to_dict() | {"fits": {f"{c:g}": b.fits(c) for c in cards}} for b in budgets]

    values = {
        "schema_version": 2,
        "card_gb": result.card_gb,
        "device": result.device,
        "tokens": result.tokens,
        "own": rows(result.own),
        "shapes": rows(result.shapes),
        "notes": result.notes,
    }
    write_json_atomic(run.path(OUTPUT), values)


def check_on_this_machine(
    recipe: Recipe, strategy: str, tokens: int, completion: int
) -> tuple[MemoryBudget, int]:
    """Return the prediction for one pass of two rows or pairs, and what the recipe's real model was
    seen to take: bytes of live tensors, by the same tracker, on the CPU. They must be equal."""
    recipe = change_recipe(recipe, {"model.device": "cpu"})
    config = load_model_config(recipe.model.name_or_path, recipe.model.revision)
    asked = {"sequence_tokens": tokens, "completion_tokens": completion, "rows": 2}
    budget = predict_peak(config, recipe, strategy, device="cpu", **asked)
    plan = find_strategy(strategy)
    question = Question(strategy, device="cpu", **asked)
    trace = trace_real(recipe, plan, make_shape(config, recipe, plan, question))
    return budget, trace.find_peak()[0]


def compare_with_measured(run: Run) -> list[dict[str, Any]]:
    """Return predicted beside measured, one row per finished stage that was predicted before.

    Keys: stage, strategy, predicted and measured (bytes of tensors), error (predicted / measured
    - 1), resident (what the process grew to, with all that the libraries keep), device.
    """
    rows = []
    for name, strategy in MEASURED_STAGES.items():
        record = run.manifest["stages"].get(name, {})
        memory = record.get("memory", {})
        if "predicted_bytes" not in memory:
            continue
        rows.append(
            {
                "stage": name,
                "strategy": strategy,
                "predicted": memory["predicted_bytes"],
                "measured": memory["measured_bytes"],
                "error": memory["error"],
                "resident": record["peak_memory_bytes"],
                "device": record["device"],
            }
        )
    return rows
