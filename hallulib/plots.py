"""Every figure of the course, in one style that can be read from the back of a room.

Each function takes plain rows or dicts as the stages write them, draws one matplotlib figure and
returns it. Curves differ in colour and in line style, bars in colour and in a printed label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#0b5fa5", "#c55a11", "#2e7d32", "#b3261e", "#6b6b6b"
SYSTEM_STYLE: dict[str, tuple[str, str, str]] = {
    "base": (GREY, ":", "base"),
    "sft": (RED, "--", "SFT"),
    "dpo": (GREEN, "-", "DPO + SFT term"),
    "dpo_plain": (ORANGE, "-.", "plain DPO"),
    "sft_on_chosen": (BLUE, ":", "SFT on chosen (control)"),
}
STYLE = {
    "figure.dpi": 110, "font.size": 12, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 2.2, "legend.frameon": False,
}  # fmt: skip


def new_figure(columns: int = 1, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """An empty figure in the course's style, and its panels side by side."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(9.0, height), squeeze=False)
    return figure, list(axes[0])


def finish(figure: Figure, title: str = "") -> Figure:
    """Give a figure its title; return it to be shown once, as the last line of a cell."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.tight_layout()
    plt.close(figure)
    return figure


def plot_memory_strategies(
    strategies: Mapping[str, Mapping[str, float]], card_gb: float, title: str
) -> Figure:
    """Stacked bars of predicted bytes (strategy -> term -> bytes) against the card's line."""
    figure, (axis,) = new_figure(height=4.8)
    colours = plt.get_cmap("tab10")
    base = np.zeros(len(strategies))
    for index, term in enumerate(next(iter(strategies.values()))):
        sizes = np.array([strategy[term] for strategy in strategies.values()]) / 2**30
        axis.bar(range(len(sizes)), sizes, bottom=base, color=colours(index),
                 label=term.replace("_", " "), edgecolor="white", linewidth=0.5)  # fmt: skip
        base += sizes
    for place, total in enumerate(base):
        axis.text(place, total, f"{total:.1f}", ha="center", va="bottom")
    axis.axhline(card_gb, color=RED, linestyle="--")
    axis.text(len(base) - 0.5, card_gb, f"{card_gb:g} GiB card", color=RED, va="bottom", ha="right")
    axis.set_xticks(range(len(base)), [name.replace("_", "\n") for name in strategies])
    axis.set_ylabel("predicted peak (GiB)")
    axis.legend(fontsize=9, ncols=2)
    return finish(figure, title)


def _draw(
    axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, colour: str, line: str, label: str = ""
) -> None:
    """One metric over the steps of a metrics.jsonl; validation, which is rarer, with markers."""
    kept = [row for row in rows if key in row]
    steps, values = [row["step"] for row in kept], [row[key] for row in kept]
    marker = "o" if key.startswith(("eval", "guardrail")) else None
    axis.plot(steps, values, line, color=colour, marker=marker, markersize=4, label=label or None)


def plot_dpo_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss, rewards and margin over the steps of dpo/metrics.jsonl."""
    figure, (left, middle, right) = new_figure(3)
    _draw(left, rows, "dpo_loss", BLUE, "-", "training")
    _draw(left, rows, "eval_dpo_loss", ORANGE, "--", "validation")
    left.axhline(math.log(2), color=GREY, linestyle=":", label="ln 2")
    _draw(middle, rows, "eval_rewards/chosen", GREEN, "-", "chosen")
    _draw(middle, rows, "eval_rewards/rejected", RED, "--", "rejected")
    _draw(middle, rows, "eval_rewards/margins", BLUE, ":", "margin")
    _draw(right, rows, "eval_rewards/accuracies", BLUE, "-")
    left.set(xlabel="step", title="DPO loss")
    middle.set(xlabel="step", title="rewards (validation)")
    right.set(xlabel="step", title="reward accuracy", ylim=(0, 1.05))
    left.legend(fontsize=9)
    middle.legend(fontsize=9)
    return finish(figure, "Sequential DPO")


def plot_guardrail(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Reward accuracy beside what the model really writes, per arm (arm -> metrics rows)."""
    panels = (
        ("eval_rewards/accuracies", "reward accuracy"),
        ("guardrail/hallucination_rate", "hallucinated summaries"),
        ("guardrail/omission_rate", "facts left out"),
    )
    figure, axes = new_figure(len(panels), height=4.2)
    for axis, (key, title) in zip(axes, panels, strict=True):
        for arm, rows in arms.items():
            _draw(axis, rows, key, *SYSTEM_STYLE[arm])
        axis.set(xlabel="step", title=title, ylim=(-0.03, 1.03))
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    finish(figure, "The guardrail: what the margins do not show")
    figure.subplots_adjust(bottom=0.26)
    return figure


def plot_rates(rates: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """A rate per system (a `Rate`'s dict: value, low, high, n, unit) with its 95 % interval."""
    figure, (axis,) = new_figure(height=0.7 * len(rates) + 1.6)
    for place, (name, rate) in enumerate(rates.items()):
        colour, _, label = SYSTEM_STYLE.get(name, (GREY, "-", name))
        axis.barh(place, rate["value"], color=colour, alpha=0.75)
        reach = [[rate["value"] - rate["low"]], [rate["high"] - rate["value"]]]
        axis.errorbar(rate["value"], place, xerr=reach, color="black", capsize=5)
        axis.text(rate["high"] + 0.015, place, f"{rate['value']:.1%}", va="center")
        axis.text(-0.01, place, f"{label}  (n = {rate['n']})", va="center", ha="right")
    axis.set(xlabel="summaries with at least one hallucination", xlim=(0, 1.05), yticks=[])
    axis.invert_yaxis()
    return finish(figure, title)
