"""The fastest setting that fits on a card."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import torch
from tqdm.auto import tqdm

from hallulib.errors import RecipeError
from hallulib.files import resolve_path
from hallulib.memory.budget import read_lengths
from hallulib.memory.peak import GIB, MemoryBudget, predict_peak
from hallulib.recipe import Recipe, load_recipe, name_nearest

CARDS = {  # GiB, as the makers state; of a T4 what an empty one offers
    "T4": 14.4, "RTX 3060 12GB": 12, "RTX 4060 Ti 16GB": 16, "RTX 4070": 12, "RTX 4090": 24,
    "RTX 5070": 12, "L4": 24, "A10G": 24, "A100 40GB": 40, "A100 80GB": 80, "H100": 80,
}  # fmt: skip
MARGIN = 0.05  # of the card: what a plan leaves free
PASSES = ("cached_reference_pass2", "cached_reference_pass1", "sft")  # what needs most comes first


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
