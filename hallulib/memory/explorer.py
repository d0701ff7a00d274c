"""Sliders over predictions: what ships is looked up, what is missing is computed when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from hallulib import plots
from hallulib.memory.peak import MemoryBudget
from hallulib.memory.prediction_cache import PredictionCache
from hallulib.memory.strategies import STRATEGIES
from hallulib.memory.table import (
    BATCHES,
    CARDS_GB,
    COMPARED,
    LENGTHS,
    MODELS,
    list_strategies,
    predict_large,
)

PRECISIONS = (("bf16", "none"), ("int8", "int8"), ("NF4", "nf4"))
TWO = "two models"
ONE_MODEL = {STRATEGIES[name].title: name for name in list_strategies("nf4")[1:]}


@dataclass(frozen=True)
class Setting:
    """What is compared: `rows` pairs of `tokens` at a time, half of them completion."""

    model: str
    tokens: int
    rows: int = 1
    quantization: str = "nf4"
    checkpointing: bool = True


class _NotPredicted(Exception):
    """Nobody has computed this one yet."""


class _Known(PredictionCache):
    """Only what ships or was computed here before."""

    def get(self, key: str) -> dict[str, Any]:
        found = super().get(key)
        if found is None:
            raise _NotPredicted
        return found


def look_up(setting: Setting, strategies: Sequence[str]) -> dict[str, MemoryBudget]:
    """Return strategy -> prediction, for those that were made."""
    known, found = _Known.default(), {}
    for name in strategies:
        try:
            found[name] = predict_large(strategy=name, cache=known, **vars(setting))
        except _NotPredicted:
            continue
    return found


def plot_bars(setting: Setting, card_gb: float, strategies: Sequence[str] = COMPARED) -> Figure:
    """Return stacked bars against the card's line, of those strategies that were predicted."""
    bars = {name: budget.terms for name, budget in look_up(setting, strategies).items()}
    pairs = "one pair" if setting.rows == 1 else f"{setting.rows} pairs"
    title = f"{setting.model.split('/')[-1]}, {pairs} of {setting.tokens} tokens"
    return plots.plot_memory_strategies(bars, card_gb, title)


class Explorer:
    """Controls beside the figure that they redraw; a button computes what was never predicted.

    Without a browser the controls stand still: show `plot_bars` beside them.
    """

    def __init__(self, start: Setting, card_gb: float) -> None:
        names = [TWO, *ONE_MODEL]
        self.controls: dict[str, widgets.Widget] = {
            "model": widgets.Dropdown(options=list(MODELS), value=start.model),
            "tokens": widgets.SelectionSlider(options=LENGTHS, value=start.tokens),
            "rows": widgets.SelectionSlider(options=BATCHES, value=start.rows),
            "quantization": widgets.ToggleButtons(options=PRECISIONS, value=start.quantization),
            "checkpointing": widgets.Checkbox(value=start.checkpointing),
            "card, GiB": widgets.SelectionSlider(options=CARDS_GB, value=card_gb),
            "strategies": widgets.SelectMultiple(options=names, value=names, rows=len(names)),
        }
        self.button = widgets.Button(description="Predict what is missing")
        self.bar = widgets.IntProgress(layout={"visibility": "hidden"})
        room = {"flex": "1 1 auto", "min_width": "0", "max_width": "1000px"}
        self.picture = widgets.Image(format="png", layout=room | {"object_fit": "contain"})
        for name, control in self.controls.items():
            control.description = {"rows": "pairs", "quantization": "base in"}.get(name, name)
            control.layout.width = "22em"
            control.observe(self.draw, names="value")
        self.controls["quantization"].style.button_width = "5.5em"
        self.button.on_click(self.predict_missing)
        left = widgets.VBox(
            [*self.controls.values(), self.button, self.bar], layout={"flex": "0 0 23em"}
        )
        self.box = widgets.HBox([left, self.picture])
        self.draw()

    @property
    def setting(self) -> Setting:
        """What the controls say."""
        return Setting(**{name: self.controls[name].value for name in vars(Setting("", 0))})

    @property
    def strategies(self) -> list[str]:
        """The strategies that are ticked, in the chosen precision."""
        named = ONE_MODEL | {TWO: list_strategies(self.setting.quantization)[0]}
        return [named[name] for name in self.controls["strategies"].value]

    def draw(self, _: Any = None) -> None:
        """Redraw from what is known; offer to compute the rest."""
        known = look_up(self.setting, self.strategies)
        missing = len(self.strategies) - len(known)
        self.button.layout.visibility = "visible" if missing else "hidden"
        self.button.description = f"Predict the {missing} missing"
        png = BytesIO()
        if known:
            figure = plot_bars(self.setting, self.controls["card, GiB"].value, list(known))
            figure.savefig(png, format="png")
        self.picture.value = png.getvalue()

    def predict_missing(self, _: Any = None) -> None:
        """Compute what the controls ask for and nobody has predicted; seconds each."""
        missing = [n for n in self.strategies if n not in look_up(self.setting, [n])]
        self.bar.max, self.bar.value, self.bar.layout.visibility = len(missing), 0, "visible"
        for name in missing:
            predict_large(strategy=name, **vars(self.setting))
            self.bar.value += 1
        self.bar.layout.visibility = "hidden"
        self.draw()


def make_explorer(model: str, tokens: int, card_gb: float) -> widgets.HBox:
    """Return the controls and their figure."""
    return Explorer(Setting(model, tokens), card_gb).box
