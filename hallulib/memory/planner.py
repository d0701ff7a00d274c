"""What fits on a card, how far it reaches, what each lever buys, and what it costs in time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from tqdm.auto import tqdm
from transformers import PretrainedConfig

from hallulib.errors import DataError, RecipeError
from hallulib.files import display_path, resolve_path
from hallulib.memory.budget import read_longest
from hallulib.memory.cards import Card, detect_card, find_card
from hallulib.memory.counts import count_parameters, load_model_config
from hallulib.memory.peak import GIB, MemoryBudget, change_recipe, predict_peak
from hallulib.memory.strategies import find_strategy
from hallulib.recipe import Recipe, load_recipe

MARGIN = 0.05  # of the card: what a plan leaves free
PASSES = ("sft", "cached_reference_pass1", "cached_reference_pass2")
STEP = 64  # tokens between the lengths that are tried
Predict = Callable[..., MemoryBudget]


@dataclass(frozen=True)
class Plan:
    """The fastest setting that fits: changes to the recipe, and the prediction for each pass."""

    card: Card
    changes: dict[str, Any]
    passes: list[MemoryBudget]


def find_longest_sequence(
    config: PretrainedConfig, recipe: Recipe, strategy: str, card_gb: float
) -> int:
    """Return the longest sequence, a multiple of 64 tokens, that fits; 0 when none does."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", 32768)

    def need(count: int) -> MemoryBudget:
        return predict_peak(config, recipe, strategy, sequence_tokens=STEP * count)

    return STEP * search_largest(need, card_gb, min(longest, 32768) // STEP)


def find_largest_batch(
    config: PretrainedConfig, recipe: Recipe, strategy: str, card_gb: float, tokens: int = 0
) -> int:
    """Return the largest micro-batch (pairs, or rows of SFT) that fits; 0 when none does."""

    def need(count: int) -> MemoryBudget:
        return predict_peak(config, recipe, strategy, rows=count, sequence_tokens=tokens)

    return search_largest(need, card_gb, 64)


def search_largest(need: Callable[[int], MemoryBudget], card_gb: float, most: int) -> int:
    """Return the largest count in 1..`most` whose prediction fits, 0 when none does.

    Memory grows almost in a straight line, so the next guess lies where the line through the last
    two would meet the card: a few predictions instead of one per count.
    """

    def measure_room(count: int) -> float:
        budget = need(count)
        room = card_gb * GIB - budget.needed - budget.terms["cuda_context"]
        return room if budget.fits(card_gb) else min(-1.0, room)

    low, beyond, slope, turn = 1, most + 1, 0.0, 0
    room = measure_room(1)
    if room < 0:
        return 0
    while beyond - low > 1:
        turn += 1
        guess = low + int(room / slope) if slope > 0 else low + 1
        if turn % 3 == 0:
            guess = (low + beyond) // 2  # the line may be bent
        guess = min(max(guess, low + 1), beyond - 1)
        found = measure_room(guess)
        slope = (room - found) / (guess - low)
        if found >= 0:
            low, room = guess, found
        else:
            beyond = guess
    return low


def make_plan(
    config: PretrainedConfig,
    recipe: Recipe,
    card: Card,
    tokens: int,
    completion: int,
    predict: Predict = predict_peak,
) -> Plan:
    """Return the fastest setting whose passes all fit with a margin, for rows of `tokens`.

    Fastest first: unpacked weights before packed ones, activations kept before recomputed, large
    micro-batches before small. The pairs per optimiser step stay the recipe's. Raises
    RecipeError when nothing fits, naming the term that is in the way.
    """
    room = card.memory_gb * (1 - MARGIN)
    weights = count_parameters(config, recipe.lora).base_bytes("none", 2)
    asked = {"sequence_tokens": tokens, "completion_tokens": completion}
    least: MemoryBudget | None = None
    for quantization, checkpointing in product(("none", "nf4"), (False, True)):
        if quantization == "none" and weights > room * GIB:
            continue
        best = None
        for size in list_sizes(recipe):
            changes = list_changes(recipe, quantization, checkpointing, size, tokens)
            changed = change_recipe(recipe, changes)
            passes: list[MemoryBudget] = []
            for name in reversed(PASSES):  # training with pairs needs most: seldom a second look
                passes.insert(0, predict(config, changed, name, **asked))
                if not passes[0].fits(room):
                    break
            else:
                best = Plan(card, changes, passes)
            if size == 1:
                least = min(filter(None, (least, passes[-1])), key=lambda budget: budget.needed)
            if best is None or (size > 1 and best.changes is changes):
                break
        if best is not None:
            return best
    raise RecipeError(
        f"Nothing fits in {card.memory_gb:g} GiB: the least is {least.total / GIB:.1f} GiB, of "
        f"which {least.terms[least.largest] / GIB:.1f} are {least.largest.replace('_', ' ')}.",
        "Shorten the rows (model.max_length), choose a smaller model, or a larger card.",
    )


def list_sizes(recipe: Recipe) -> list[int]:
    """Return micro-batches to try that divide the recipe's step: 1 first, then the largest. Where
    not even one pair fits, no more need be tried."""
    steps = [s.batch_size * s.gradient_accumulation for s in (recipe.sft, recipe.dpo)]
    return [size for size in (1, 8, 4, 2) if all(step % size == 0 for step in steps)]


def list_changes(
    recipe: Recipe, quantization: str, checkpointing: bool, size: int, tokens: int
) -> dict[str, Any]:
    """Return the settings of a recipe that trains `size` rows or pairs at a time."""
    changes: dict[str, Any] = {
        "model.quantization": quantization, "model.gradient_checkpointing": checkpointing,
        "model.dtype": "bfloat16", "model.max_length": tokens, "reference.batch_size": size,
    }  # fmt: skip
    for name, section in (("sft", recipe.sft), ("dpo", recipe.dpo)):
        whole = section.batch_size * section.gradient_accumulation
        changes[f"{name}.batch_size"] = size
        changes[f"{name}.gradient_accumulation"] = whole // size
    return changes


LEVERS: dict[str, dict[str, Any]] = {
    "pack the base weights (NF4)": {"model.quantization": "nf4"},
    "recompute activations": {"model.gradient_checkpointing": True},
    "halve the rows": {"model.max_length": 0.5},
    "one pair at a time": {"dpo.batch_size": 1, "sft.batch_size": 1},
}


def price_levers(
    config: PretrainedConfig,
    recipe: Recipe,
    strategy: str,
    tokens: int,
    predict: Predict = predict_peak,
) -> dict[str, int]:
    """Return the bytes that each lever would save on `strategy`, most first; those that are
    already pulled are left out."""
    now, saved = predict(config, recipe, strategy, sequence_tokens=tokens), {}
    for name, changes in LEVERS.items():
        shorter = tokens // 2 if "model.max_length" in changes else tokens
        rest = {key: value for key, value in changes.items() if key != "model.max_length"}
        then = predict(config, change_recipe(recipe, rest), strategy, sequence_tokens=shorter)
        if now.total > then.total:
            saved[name] = now.total - then.total
    return dict(sorted(saved.items(), key=lambda item: -item[1]))


def estimate_hours(plan: Plan, parameters: int, rows: dict[str, int]) -> dict[str, float]:
    """Return hours per pass from the card's published or measured rate; empty where there is none.

    `rows` are the rows (SFT) and pairs ("cached_reference_pass1", "cached_reference_pass2") that
    each pass runs in all. A forward pass costs 2 operations per parameter and token; without
    checkpointing training is spared one. No promise: the rate is that of another model on another
    day.
    """
    if plan.card.rate is None:
        return {}
    hours = {}
    for budget in plan.passes:
        sides = 1 if budget.strategy == "sft" else 2
        tokens = rows[budget.strategy] * sides * budget.sequence_tokens
        spared = find_strategy(budget.strategy).trains and not budget.checkpointing
        work = 2 * parameters * tokens * (budget.passes - spared)
        hours[budget.strategy] = work / plan.card.rate / 3600
    return hours


def describe_plan(plan: Plan, hours: dict[str, float], levers: dict[str, int]) -> str:
    """Return the plan in plain words: what to set, what it needs, how long, what would help."""
    lines = [f"{plan.card.name}, {plan.card.memory_gb:g} GiB: the fastest of what fits"]
    lines += [f"  {key} = {value}" for key, value in plan.changes.items()]
    for budget in plan.passes:
        took = f", {hours[budget.strategy]:.1f} h" if budget.strategy in hours else ""
        lines.append(
            f"{budget.title}: {budget.total / GIB:.1f} GiB ({budget.method}), most of it "
            f"{budget.largest.replace('_', ' ')}{took}"
        )
    if hours:
        lines.append(f"Hours are no promise; the rate is from: {plan.card.source}.")
        if plan.card.price_per_hour is not None:
            price = sum(hours.values()) * plan.card.price_per_hour
            asked = f"{plan.card.price_source}, {plan.card.as_of}"
            lines.append(f"Cost about {price:.2f} {plan.card.currency} ({asked}).")
    else:
        lines.append("No rate is known for this card (rates.yaml); on it, leave --gpu away.")
    lines += [f"Lever: {name} saves {saved / GIB:.1f} GiB" for name, saved in levers.items()]
    return "\n".join(lines)


def plan_training(model: str, gpu: str, data: str, recipe_name: str) -> tuple[str, Recipe]:
    """Return a plan in plain words, and the recipe it makes of `recipe_name`.

    `gpu` is a name or a size, "" the card that is here; `data` a run folder or its audit.json, ""
    rows as long as the recipe allows. Raises RecipeError, DataError or HallulibError.
    """
    recipe = load_recipe(recipe_name, {"model.name_or_path": model} if model else None)
    card = find_card(gpu) if gpu else detect_card()
    longest = read_longest(recipe, read_audit(data) if data else {})
    tokens, completion = longest["sequence"], longest["completion"]
    config = load_model_config(recipe.model.name_or_path, recipe.model.revision)
    with tqdm(desc="trying settings", unit="prediction", delay=1) as bar:

        def predict(*asked: Any, **more: Any) -> MemoryBudget:
            bar.update()
            return predict_peak(*asked, **more)

        plan = make_plan(config, recipe, card, tokens, completion, predict)
        changed = change_recipe(recipe, plan.changes)
        levers = price_levers(config, changed, PASSES[2], tokens, predict)
    parameters = count_parameters(config, recipe.lora).base
    steps = {"sft": changed.sft.max_steps, "dpo": changed.dpo.max_steps}
    done = {n: steps[n] * b.batch_size * b.gradient_accumulation
            for n, b in (("sft", changed.sft), ("dpo", changed.dpo))}  # fmt: skip
    rows = {PASSES[0]: done["sft"], PASSES[1]: recipe.pairs.notes, PASSES[2]: done["dpo"]}
    text = f"{recipe.model.name_or_path}, rows of {tokens} tokens ({longest['source']})\n"
    return text + describe_plan(plan, estimate_hours(plan, parameters, rows), levers), changed


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
