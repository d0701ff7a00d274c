"""Sliders over the predictions that were made: nothing is computed while they move."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from hallulib import plots
from hallulib.memory.budget import BudgetResult
from hallulib.memory.peak import MemoryBudget
from hallulib.memory.table import CARDS_GB, COMPARED, LENGTHS


def select_bars(
    budget: BudgetResult, model: str, tokens: int, checkpointing: bool = True
) -> dict[str, MemoryBudget]:
    """Return strategy -> prediction for one model and length, as far as they were made."""
    wanted = (model, tokens, checkpointing)
    return {
        b.strategy: b for b in budget.shapes
        if (b.model, b.sequence_tokens, b.checkpointing) == wanted and b.strategy in COMPARED
    }  # fmt: skip


def plot_bars(
    budget: BudgetResult, model: str, tokens: int, card_gb: float, checkpointing: bool = True
) -> Figure:
    """Return the stacked bars of every strategy against the card's line."""
    bars = select_bars(budget, model, tokens, checkpointing)
    title = f"{model.split('/')[-1]}, one pair of {tokens} tokens"
    return plots.plot_memory_strategies({n: b.terms for n, b in bars.items()}, card_gb, title)


def make_explorer(budget: BudgetResult) -> widgets.VBox:
    """Return controls for model, tokens, checkpointing and card above the figure they redraw.

    Without a browser they stand still: show `plot_bars` beside them.
    """
    models = sorted({b.model for b in budget.shapes})
    controls = {
        "model": widgets.Dropdown(options=models, description="model"),
        "tokens": widgets.SelectionSlider(options=LENGTHS, description="tokens"),
        "card_gb": widgets.SelectionSlider(options=CARDS_GB, value=12, description="card, GiB"),
        "checkpointing": widgets.Checkbox(value=True, description="checkpointing"),
    }

    picture = widgets.Image(format="png")

    def draw(_: Any = None) -> None:
        chosen = {name: control.value for name, control in controls.items()}
        png = BytesIO()
        plot_bars(budget, **chosen).savefig(png, format="png")
        picture.value = png.getvalue()

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    return widgets.VBox([*controls.values(), picture])
