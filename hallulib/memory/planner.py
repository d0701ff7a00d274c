"""What fits on a card, how far it reaches, what each lever buys, and what it costs in time."""

from __future__ import annotations

import json
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from hallulib.errors import DataError, RecipeError
from hallulib.files import display_path, resolve_path
from hallulib.memory.budget import read_lengths
from hallulib.memory.counts import count_parameters, load_model_config
from hallulib.memory.passes import StepShape, find_strategy, make_rows, sft_loss
from hallulib.memory.peak import GIB, MemoryBudget, change_recipe, predict_peak
from hallulib.models import attach_adapter
from hallulib.recipe import Recipe, load_recipe, nearest

RATES = Path(__file__).parent / "rates.yaml"
STEP_PASSES = 3  # with checkpointing: forward, recomputation, backward
MARGIN = 0.05  # of the card: what a plan leaves free
PASSES = ("sft", "cached_reference_pass1", "cached_reference_pass2")
# A shape wide enough that time goes into matrices, as in a large model; a step takes a second.
TIMED_SHAPE = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=8, vocab_size=4096,
)  # fmt: skip
TIMED_TOKENS, TIMED_STEPS = 256, 4
LEVERS: dict[str, dict[str, Any]] = {
    "pack the base weights (NF4)": {"model.quantization": "nf4"},
    "recompute activations": {"model.gradient_checkpointing": True},
    "one pair at a time": {"dpo.batch_size": 1},
}


# A card: name, memory_gb and, where somebody measured or asked them, `rate` (operations a second of
# a training step) with its source, and price_per_hour with currency, price_source and as_of.
Card = dict[str, Any]


def load_cards() -> list[Card]:
    """Return the cards of rates.yaml, which is dated and meant to be edited."""
    cards = yaml.safe_load(RATES.read_text("utf-8"))["cards"]
    for card in cards:
        step = card.get("step")
        if step:
            work = 2 * STEP_PASSES * step["parameters"] * step["tokens"]
            card["rate"] = work / step["seconds"]
    return cards


def find_card(text: str) -> Card:
    """Return the card of that name in rates.yaml, or of that size ("12GB", "12"); "" is the GPU of
    this machine, timed. Raises RecipeError for an unknown one."""
    if not text:
        return _detect_card()
    size = text.lower().removesuffix("gb").removesuffix("gib").strip()
    if size.replace(".", "", 1).isdigit() and float(size) > 0:
        return {"name": f"{float(size):g} GiB card", "memory_gb": float(size)}
    cards = {card["name"]: card for card in load_cards()}
    for name, card in cards.items():
        if name.lower() == text.lower():
            return card
    close = nearest(text, list(cards))
    hint = f" Did you mean '{close}'?" if close else ""
    raise RecipeError(
        f"There is no card '{text}'.{hint}",
        f"Give its memory, as 12GB, or one of {', '.join(cards)}.",
    )


def _detect_card() -> Card:
    if not torch.cuda.is_available():
        raise RecipeError("There is no NVIDIA GPU here.", "Name one to plan for: --gpu 12GB.")
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_gb": found.total_memory / GIB,
        "rate": measure_rate("cuda", torch.bfloat16),
        "source": "a few steps of a small shape in bfloat16 on this card, just now",
    }


def measure_rate(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return operations a second of SFT steps with LoRA here: the median of a few, after one.

    A step is a forward and a backward pass through frozen weights: 2 x 2 operations per weight
    and token.
    """
    recipe = load_recipe("tiny-cpu", {"model.device": device})
    base = LlamaForCausalLM(TIMED_SHAPE).to(device, dtype).requires_grad_(False)
    policy = attach_adapter(base, recipe).train()
    batch = make_rows(StepShape(rows=1, tokens=TIMED_TOKENS, completion=TIMED_TOKENS // 2))
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        began = time.perf_counter()
        sft_loss(policy, batch).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    work = 2 * 2 * count_parameters(TIMED_SHAPE, recipe).linear * TIMED_TOKENS
    return work / statistics.median(seconds[1:])


def find_reach(predict: Callable[[int, bool], MemoryBudget], card_gb: float, most: int) -> int:
    """Return the largest count in 1..`most` that fits the card, 0 when none does.

    `predict(count, replay)` answers for a count of what grows: pairs at a time, tokens. Live bytes
    are quick and tell what is too large; from there on a replay decides.
    """

    def is_too_large(count: int) -> bool:
        return predict(count, False).total > card_gb * GIB

    count = bisect_left(range(1, most + 1), True, key=is_too_large)
    while count and not predict(count, True).fits(card_gb):
        count -= 1
    return count


def find_setting(
    config: PretrainedConfig, recipe: Recipe, memory_gb: float, lengths: dict[str, int]
) -> tuple[dict[str, Any], list[MemoryBudget]]:
    """Return the fastest changes to the recipe with which all passes fit, with a margin, on rows of
    `lengths`, and the prediction for each pass.

    Raises RecipeError when nothing fits, naming the term that is in the way.
    """
    room, too_large = memory_gb * (1 - MARGIN), None
    unpacked = 2 * count_parameters(config, recipe).base
    with tqdm(list_changes(recipe, lengths["tokens"]), desc="trying", unit="setting") as bar:
        for changes in bar:
            if changes["model.quantization"] == "none" and unpacked > room * GIB:
                continue
            changed = change_recipe(recipe, changes)
            too_large = _find_too_large(config, changed, room, lengths | {"replay": False})
            too_large = too_large or _find_too_large(config, changed, room, lengths)
            if too_large is None:
                return changes, [predict_peak(config, changed, n, **lengths) for n in PASSES]
    most = too_large.largest
    raise RecipeError(
        f"Nothing fits in {memory_gb:g} GiB: the least is {too_large.total / GIB:.1f} GiB, of "
        f"which {too_large.terms[most] / GIB:.1f} are {most.replace('_', ' ')}.",
        "Shorten the rows (model.max_length), choose a smaller model, or a larger card.",
    )


def _find_too_large(
    config: PretrainedConfig, recipe: Recipe, room: float, asked: dict[str, Any]
) -> MemoryBudget | None:
    """Return the prediction of a pass that does not fit, if there is one."""
    for name in reversed(PASSES):  # training with pairs needs most
        budget = predict_peak(config, recipe, name, **asked)
        if budget.total > room * GIB if budget.needed is None else not budget.fits(room):
            return budget
    return None


def list_changes(recipe: Recipe, tokens: int) -> list[dict[str, Any]]:
    """Return settings to try, the fastest first: unpacked weights before packed ones, activations
    kept before recomputed, large micro-batches before small. The rows and pairs of an optimiser
    step stay the recipe's."""
    sections = (("sft", recipe.sft), ("dpo", recipe.dpo))
    steps = {name: s.batch_size * s.gradient_accumulation for name, s in sections}
    sizes = [size for size in (8, 4, 2, 1) if all(step % size == 0 for step in steps.values())]
    found = []
    for quantization, checkpointing, size in product(("none", "nf4"), (False, True), sizes):
        changes = {
            "model.quantization": quantization, "model.gradient_checkpointing": checkpointing,
            "model.dtype": "bfloat16", "model.max_length": tokens, "reference.batch_size": size,
        }  # fmt: skip
        for name, step in steps.items():
            changes[f"{name}.batch_size"] = size
            changes[f"{name}.gradient_accumulation"] = step // size
        found.append(changes)
    return found


def price_levers(config: PretrainedConfig, recipe: Recipe, tokens: int) -> dict[str, int]:
    """Return the live bytes that each lever would save on training with pairs, most first; those
    that are already pulled are left out."""

    def ask(changes: dict[str, Any], tokens: int) -> int:
        changed = change_recipe(recipe, changes)
        return predict_peak(config, changed, PASSES[2], tokens=tokens, replay=False).total

    now, saved = ask({}, tokens), {"halve the rows": ask({}, tokens // 2)}
    saved |= {name: ask(changes, tokens) for name, changes in LEVERS.items()}
    saved = {name: now - then for name, then in saved.items() if then < now}
    return dict(sorted(saved.items(), key=lambda item: -item[1]))


def estimate_hours(budget: MemoryBudget, recipe: Recipe, parameters: int, rate: float) -> float:
    """Return the hours of a pass over all rows or pairs of the recipe at a published or measured
    rate.

    A forward pass costs 2 operations per parameter and token; without checkpointing training is
    spared one. No promise: the rate is that of another model on another day.
    """
    plan = find_strategy(budget.strategy)
    section = recipe.sft if plan.runs == "sft" else recipe.dpo
    rows = section.max_steps * section.batch_size * section.gradient_accumulation
    if plan.runs == "reference":
        rows = recipe.pairs.notes
    tokens = rows * budget.tokens * (1 if plan.runs == "sft" else 2)
    spared = plan.trains and not recipe.model.gradient_checkpointing
    return 2 * parameters * tokens * (plan.passes - spared) / rate / 3600


def plan_training(model: str, gpu: str, data: str, recipe_name: str) -> tuple[str, Recipe]:
    """Return a plan in plain words (what to set, what it needs, how long, what would help), and the
    recipe it makes of `recipe_name`.

    `gpu` is a name or a size, "" the card that is here; `data` a run folder or its audit.json, ""
    rows as long as the recipe allows. Raises RecipeError, DataError or HallulibError.
    """
    recipe = load_recipe(recipe_name, {"model.name_or_path": model} if model else None)
    card, found = find_card(gpu), read_lengths(recipe, read_audit(data) if data else {})
    lengths = {"tokens": found["sequence"], "completion": found["completion"]}
    config = load_model_config(recipe.model.name_or_path, recipe.model.revision)
    changes, passes = find_setting(config, recipe, card["memory_gb"], lengths)
    planned = change_recipe(recipe, changes)
    lines = [
        f"{recipe.model.name_or_path}, rows of {lengths['tokens']} tokens ({found['source']})",
        f"{card['name']}, {card['memory_gb']:g} GiB: the fastest of what fits",
        *(f"  {key} = {value}" for key, value in changes.items()),
        *describe_passes(card, passes, planned, count_parameters(config, recipe).base),
    ]
    levers = price_levers(config, planned, lengths["tokens"])
    lines += [f"Lever: {name} saves {saved / GIB:.1f} GiB" for name, saved in levers.items()]
    return "\n".join(lines), planned


def describe_passes(
    card: Card, passes: list[MemoryBudget], planned: Recipe, parameters: int
) -> list[str]:
    """Return a line for each pass, what it needs and where a rate is known how long it takes, and
    what stands behind hours and price."""
    lines, hours = [], 0.0
    for budget in passes:
        most = budget.largest.replace("_", " ")
        line = f"{budget.title}: {budget.total / GIB:.1f} GiB, most of it {most}"
        if "rate" in card:
            took = estimate_hours(budget, planned, parameters, card["rate"])
            line, hours = f"{line}, {took:.1f} h", hours + took
        lines.append(line)
    if "rate" not in card:
        return [*lines, "No rate is known for this card (rates.yaml); on it, leave --gpu away."]
    lines.append(f"Hours are no promise; the rate is from: {card['source']}.")
    if "price_per_hour" in card:
        price, asked = hours * card["price_per_hour"], f"{card['price_source']}, {card['as_of']}"
        lines.append(f"Cost about {price:.2f} {card['currency']} ({asked}).")
    return lines


def read_audit(data: str) -> dict[str, Any]:
    """Return the token counts of a run folder or an audit.json. Raises DataError without them."""
    path = resolve_path(data)
    path = path / "data/audit.json" if path.is_dir() else path
    try:
        audit = json.loads(path.read_text("utf-8"))
        audit["splits"]["train"]["total_tokens"]["max"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{display_path(path)} holds no token counts.",
            "Give a run folder in which notebook 01_data_prep has run, or its data/audit.json.",
        ) from None
    return audit
