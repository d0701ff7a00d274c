"""Sliders over predictions: live bytes are computed while they move."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from hallulib import plots
from hallulib.memory.budget import COMPARED, predict_large
from hallulib.memory.passes import STRATEGIES
from hallulib.memory.peak import MemoryBudget
from hallulib.memory.skeleton import SHIPPED

PRECISIONS = (("bf16", "none"), ("int8", "int8"), ("NF4", "nf4"))
# Two models in the precision that is asked for; the other strategies take it from the recipe.
TWO, TWO_MODELS = "two models", {"none": "dual_model", "int8": "dual_8bit", "nf4": "dual_4bit"}
ONE_MODEL = {STRATEGIES[n].title: n for n in COMPARED if n not in TWO_MODELS.values()}


class Explorer(widgets.HBox):
    """Controls beside the figure that they redraw. Without a browser they stand still: show a
    figure beside them."""

    def __init__(self, model: str, tokens: int, card_gb: float) -> None:
        slider, names = widgets.SelectionSlider, [TWO, *ONE_MODEL]
        self.asked: dict[str, widgets.Widget] = {
            "model": widgets.Dropdown(options=SHIPPED, value=model),
            "tokens": slider(options=(256, 512, 1024, 2048, 4096), value=tokens),
            "rows": slider(options=(1, 2, 4, 8), value=1, description="pairs"),
            "quantization": widgets.ToggleButtons(options=PRECISIONS, value="nf4"),
            "checkpointing": widgets.Checkbox(value=True),
        }
        self.card = slider(options=(8, 10, 12, 16, 24), value=card_gb)
        self.strategies = widgets.SelectMultiple(options=names, value=names, rows=len(names))
        controls = self.asked | {"card, GiB": self.card, "strategies": self.strategies}
        for name, control in controls.items():
            control.description = control.description or name
            control.layout.width = "22em"
            control.observe(self.draw, names="value")
        self.asked["quantization"].style.button_width = "5.5em"
        left = widgets.VBox(list(controls.values()), layout={"flex": "0 0 23em"})
        self.picture = widgets.Image(format="png", layout={"max_width": "1000px", "min_width": "0"})
        super().__init__([left, self.picture])
        self.draw()

    def draw(self, _: Any = None) -> None:
        """Predict the live bytes of what the controls say, and show them."""
        asked = {name: control.value for name, control in self.asked.items()}
        named = ONE_MODEL | {TWO: TWO_MODELS[asked["quantization"]]}
        found = [predict_large(strategy=named[t], **asked) for t in self.strategies.value]
        png = BytesIO()
        if found:
            plot_bars(asked["model"], found, self.card.value).savefig(png, format="png")
        self.picture.value = png.getvalue()


def plot_bars(model: str, budgets: list[MemoryBudget], card_gb: float) -> Figure:
    """Return stacked bars of the predictions against the card's line."""
    name, first = model.split("/")[-1], budgets[0]
    title = f"{name}: pairs of {first.tokens} tokens, {first.rows} at a time"
    bars = {budget.strategy: budget.terms for budget in budgets}
    return plots.plot_memory_strategies(bars, card_gb, title)
