"""Cards by name, size, or found in this machine: memory, measured rate, price with its date."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import yaml

from hallulib.errors import RecipeError
from hallulib.memory.calibrate import measure_rate
from hallulib.memory.peak import GIB
from hallulib.recipe import nearest

RATES = Path(__file__).parent / "rates.yaml"
STEP_PASSES = 3  # with checkpointing: forward, recomputation, backward


@dataclass(frozen=True)
class Card:
    """A card: its memory in GiB and, where somebody measured or asked them, operations a second of
    a training step (`rate`) and a price per hour, each with its source."""

    name: str
    memory_gb: float
    rate: float | None = None
    source: str = ""
    price_per_hour: float | None = None
    currency: str = ""
    price_source: str = ""
    as_of: date | None = None


def load_cards() -> list[Card]:
    """Return the cards of rates.yaml, which is dated and meant to be edited."""
    cards = []
    for values in yaml.safe_load(RATES.read_text("utf-8"))["cards"]:
        step = values.pop("step", None)
        if step:
            work = 2 * STEP_PASSES * step["parameters"] * step["tokens"]
            values["rate"] = work / step["seconds"]
        cards.append(Card(**values))
    return cards


def find_card(text: str) -> Card:
    """Return the card of that name in rates.yaml, or of that size ("12GB", "12").

    Raises RecipeError for an unknown one.
    """
    size = text.lower().removesuffix("gb").removesuffix("gib").strip()
    if size.replace(".", "", 1).isdigit() and float(size) > 0:
        return Card(f"{float(size):g} GiB card", float(size))
    cards = {card.name: card for card in load_cards()}
    by_key = {name.lower(): card for name, card in cards.items()}
    if text.lower() in by_key:
        return by_key[text.lower()]
    close = nearest(text, list(cards))
    hint = f" Did you mean '{close}'?" if close else ""
    raise RecipeError(
        f"There is no card '{text}'.{hint}",
        f"Give its memory, as 12GB, or one of {', '.join(cards)}.",
    )


def detect_card() -> Card:
    """Return the GPU of this machine, timed. Raises RecipeError where there is none."""
    if not torch.cuda.is_available():
        raise RecipeError("There is no NVIDIA GPU here.", "Name one to plan for: --gpu 12GB.")
    found = torch.cuda.get_device_properties(0)
    rate = measure_rate("cuda", torch.bfloat16)
    source = "a few steps of a small shape in bfloat16 on this card, just now"
    return Card(found.name, found.total_memory / GIB, rate, source)
