"""Sliders over predictions: live bytes are computed while they move, a replay when asked for."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from hallulib import plots
from hallulib.memory.budget import COMPARED, predict_large
from hallulib.memory.passes import STRATEGIES
from hallulib.memory.peak import GIB, MemoryBudget
from hallulib.memory.skeleton import SHIPPED

PRECISIONS = (("bf16", "none"), ("int8", "int8"), ("NF4", "nf4"))
# Two models in the precision that is asked for; the other strategies take it from the recipe.
TWO, TWO_MODELS = "two models", {"none": "dual_model", "int8": "dual_8bit", "nf4": "dual_4bit"}
ONE_MODEL = {STRATEGIES[n].title: n for n in COMPARED if n not in TWO_MODELS.values()}


class Explorer(widgets.HBox):
    """Controls beside the figure that they redraw; a button replays what is shown in an allocator.
    Without a browser the controls stand still: show a figure beside them."""

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
        self.button = widgets.Button(description="Does it fit? Replay")
        self.button.on_click(self.replay)
        self.bar, self.answer = widgets.IntProgress(), widgets.HTML()
        left = [*controls.values(), self.button, self.bar, self.answer]
        self.picture = widgets.Image(format="png", layout={"max_width": "1000px", "min_width": "0"})
        super().__init__([widgets.VBox(left, layout={"flex": "0 0 23em"}), self.picture])
        self.draw()

    def draw(self, _: Any = None) -> None:
        """Redraw the live bytes; what a replay said before no longer holds."""
        self.answer.value = ""
        self._predict(replay=False)

    def replay(self, _: Any = None) -> None:
        """Replay what is shown, some seconds each, and say what fits."""
        said = {True: "fits", False: "does not fit"}
        self.answer.value = "<br>".join(
            f"{b.title}: {said[b.fits(self.card.value)]}, {b.reserved / GIB:.1f} GiB reserved"
            for b in self._predict(replay=True)
        )

    def _predict(self, replay: bool) -> list[MemoryBudget]:
        """Predict what the controls say, with progress, and show it."""
        asked = {name: control.value for name, control in self.asked.items()}
        named = ONE_MODEL | {TWO: TWO_MODELS[asked["quantization"]]}
        found, self.bar.max, self.bar.value = [], len(self.strategies.value), 0
        for title in self.strategies.value:
            found.append(predict_large(strategy=named[title], replay=replay, **asked))
            self.bar.value += 1
        png = BytesIO()
        if found:
            plot_bars(asked["model"], found, self.card.value).savefig(png, format="png")
        self.picture.value = png.getvalue()
        return found


def plot_bars(model: str, budgets: list[MemoryBudget], card_gb: float) -> Figure:
    """Return stacked bars of the predictions against the card's line."""
    name, first = model.split("/")[-1], budgets[0]
    title = f"{name}: pairs of {first.tokens} tokens, {first.rows} at a time"
    bars = {budget.strategy: budget.terms for budget in budgets}
    return plots.plot_memory_strategies(bars, card_gb, title)
