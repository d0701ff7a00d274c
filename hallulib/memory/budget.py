"""What a run needs: predicted, checked, planned for a card, and held against what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from hallulib.errors import DataError, HallulibError, RecipeError
from hallulib.files import display_path, resolve_path, write_json_atomic
from hallulib.memory.passes import STRATEGIES, runs_on_cuda, trace_pass
from hallulib.memory.peak import GIB, MemoryBudget, make_shape, predict_peak
from hallulib.recipe import Recipe, load_recipe, name_nearest
from hallulib.run import Run, stage

OUTPUT = "budget/budget.json"
MEASURED_STAGES = {  # and the strategy whose prediction stands beside each
    "sft": "sft", "pairs": "generation", "reference": "cached_reference_pass1",
    "dpo": "cached_reference_pass2",
}  # fmt: skip
COMPARED = [name for name, s in STRATEGIES.items() if s.runs in ("dpo", "reference")]
LARGE = "meta-llama/Meta-Llama-3-8B-Instruct"  # the case's model, on rows of 512 tokens
CARDS = {  # GiB, as the makers state; of a T4 what an empty one offers
    "T4": 14.4, "RTX 3060 12GB": 12, "RTX 4060 Ti 16GB": 16, "RTX 4070": 12, "RTX 4090": 24,
    "RTX 5070": 12, "L4": 24, "A10G": 24, "A100 40GB": 40, "A100 80GB": 80, "H100": 80,
}  # fmt: skip
MARGIN = 0.05  # of the card: what a plan leaves free
PASSES = ("cached_reference_pass2", "cached_reference_pass1", "sft")  # what needs most comes first


def load_budget(run: Run) -> dict[str, list[MemoryBudget]]:
    """Return the predictions as written. Raises MissingArtifact before notebook 03."""
    found = json.loads(run.require(OUTPUT).read_text("utf-8"))
    return {name: [MemoryBudget(**row) for row in rows] for name, rows in found.items()}


@stage("memory", load=load_budget)
def predict_budget(recipe: Recipe, run: Run) -> dict[str, list[MemoryBudget]]:
    """Predict every strategy and write budget/budget.json: `own`, for the recipe's model on the
    longest rows of data/audit.json, and `large`, live bytes of Llama-3-8B in NF4 and bf16 on one
    pair of 512 tokens."""
    lengths, _ = read_lengths(recipe, run.require("data/audit.json"))
    names = tqdm(STRATEGIES, desc="predicting this run", unit="strategy")
    own = [predict_peak(recipe, name, **lengths) for name in names]
    names = tqdm(COMPARED, desc="predicting Llama-3-8B", unit="strategy")
    large = [predict_large(LARGE, name, 512) for name in names]
    found = {"own": own, "large": large}
    rows = {name: [asdict(b) for b in budgets] for name, budgets in found.items()}
    write_json_atomic(run.path(OUTPUT), rows)
    return found


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


def plan_training(model: str, gpu: str, data: str, recipe_name: str) -> tuple[str, Recipe]:
    """Return a plan in plain words (what to set, what it needs) and the recipe it makes of
    `recipe_name`. `gpu` is a name or a size, "" the card that is here; `data` a run folder or its
    audit.json, "" rows as long as the recipe allows."""
    recipe = load_recipe(recipe_name, {"model.name_or_path": model} if model else None)
    card, memory_gb = find_card(gpu)
    audit = resolve_path(data) if data else None
    if audit and audit.is_dir():
        audit = audit / "data/audit.json"
    lengths, source = read_lengths(recipe, audit)
    changes, passes = find_setting(recipe, memory_gb, lengths)
    lines = [
        f"{recipe.model.name_or_path}, rows of {lengths['tokens']} tokens ({source})",
        f"{card}, {memory_gb:g} GiB: the fastest of what fits",
        *(f"  {key} = {value}" for key, value in changes.items()),
        *(f"{b.title}: {b.total / GIB:.1f} GiB, most of it {b.largest}" for b in passes),
    ]
    return "\n".join(lines), change_recipe(recipe, changes)


def find_card(text: str) -> tuple[str, float]:
    """Return name and GiB of a card in CARDS, of any of that size ("12GB", "12"), or for "" of the
    GPU that is here. Raises RecipeError for an unknown one."""
    if not text and torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        return here.name, here.total_memory / GIB
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b)?", text.lower())
    if size:
        return "a card", float(size[1])
    for name, memory_gb in CARDS.items():
        if name.lower() == text.lower():
            return name, memory_gb
    unknown = f"There is no card '{text}'." + name_nearest(text, list(CARDS))
    raise RecipeError(
        unknown if text else "There is no NVIDIA GPU here.",
        f"Give its memory, as --gpu 12GB, or one of {', '.join(CARDS)}.",
    )


def find_setting(
    recipe: Recipe, memory_gb: float, lengths: dict[str, int]
) -> tuple[dict[str, Any], list[MemoryBudget]]:
    """Return the fastest changes to the recipe with which all PASSES fit, with a margin, on rows of
    `lengths`, and their predictions. RecipeError names what is in the way when nothing fits."""
    room = memory_gb * (1 - MARGIN)
    for changes in tqdm(list_changes(recipe, lengths["tokens"]), desc="trying", unit="setting"):
        changed, passes = change_recipe(recipe, changes), []
        for replay, name in product((False, True), PASSES):  # what lives is quick to tell
            passes.append(predict_peak(changed, name, **lengths, replay=replay))
            if passes[-1].exceeds(room):
                break
        else:
            return changes, passes[len(PASSES) :]
    least = passes[-1]
    raise RecipeError(
        f"Nothing fits in {memory_gb:g} GiB: the least is {least.total / GIB:.1f} GiB, of "
        f"which {max(least.terms.values()) / GIB:.1f} are {least.largest}.",
        "Shorten the rows (model.max_length), choose a smaller model, or a larger card.",
    )


def list_changes(recipe: Recipe, tokens: int) -> list[dict[str, Any]]:
    """Return settings to try, the fastest first: unpacked weights before packed ones, activations
    kept before recomputed, large micro-batches before small. The rows and pairs of an optimiser
    step stay the recipe's."""
    steps = {"sft": recipe.sft, "dpo": recipe.dpo}
    steps = {name: s.batch_size * s.gradient_accumulation for name, s in steps.items()}
    sizes = [size for size in (8, 4, 2, 1) if all(step % size == 0 for step in steps.values())]
    found = []
    for quantization, checkpointing, size in product(("none", "nf4"), (False, True), sizes):
        changes = {
            "model.quantization": quantization, "model.gradient_checkpointing": checkpointing,
            "model.device": "cuda", "model.dtype": "bfloat16", "model.max_length": tokens,
            "reference.batch_size": size,
        }  # fmt: skip
        for name, step in steps.items():
            changes |= {f"{name}.batch_size": size, f"{name}.gradient_accumulation": step // size}
        found.append(changes)
    return found


def change_recipe(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return a copy with dotted settings changed."""
    values = recipe.to_dict()
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return Recipe.model_validate(values)


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
