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
from matplotlib.colors import ListedColormap
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
    "figure.figsize": (9.0, 4.0),
    "figure.dpi": 110,
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 2.2,
    "legend.frameon": False,
}


def _new_figure(columns: int = 1, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(9.0, height), squeeze=False)
    return figure, list(axes[0])


def _finish(figure: Figure, title: str = "") -> Figure:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.tight_layout()
    plt.close(figure)  # the notebook shows the returned figure once, not twice
    return figure


def plot_source_gap(
    stated_in_note: Mapping[str, float], in_reference: Mapping[str, float]
) -> Figure:
    """Share of notes and of references that state each kind of fact (kind -> share of rows)."""
    figure, (axis,) = _new_figure(height=4.4)
    kinds = list(stated_in_note)
    places = np.arange(len(kinds))
    axis.barh(places - 0.2, [stated_in_note[k] for k in kinds], 0.38, color=BLUE, label="note")
    axis.barh(
        places + 0.2, [in_reference[k] for k in kinds], 0.38, color=ORANGE, label="reference",
        hatch="//", edgecolor="white",
    )  # fmt: skip
    axis.set_yticks(places, [kind.replace("_", " ") for kind in kinds])
    axis.set_xlabel("share of rows that state it")
    axis.invert_yaxis()
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return _finish(figure, "References know more than the notes say")


def plot_token_histogram(audit: Mapping[str, Any], split: str = "train") -> Figure:
    """Tokens per row of a split of audit.json: prompt, reference and both, against max_length."""
    figure, (axis,) = _new_figure(height=3.6)
    histogram = audit["splits"][split]["histogram"]
    edges = np.array(histogram["edges"])
    for name, colour in (("prompt", BLUE), ("reference", ORANGE), ("total", GREY)):
        axis.stairs(histogram[name], edges, color=colour, fill=name != "total", alpha=0.75,
                    linewidth=2, label=name)  # fmt: skip
    axis.axvline(audit["max_length"], color=RED, linestyle="--", label="max_length")
    axis.set_xlabel("tokens")
    axis.set_ylabel("rows")
    axis.legend()
    return _finish(figure, f"How long the {split} rows are")


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in points], [value for _, value in points]


def plot_sft_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss (training and validation) and token accuracy over the steps of sft/metrics.jsonl."""
    figure, (left, right) = _new_figure(2)
    left.plot(*_series(rows, "loss"), color=BLUE, label="training")
    left.plot(
        *_series(rows, "eval_loss"), color=ORANGE, linestyle="--", marker="o", label="validation"
    )
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend()
    right.plot(*_series(rows, "eval_token_accuracy"), color=ORANGE, linestyle="--", marker="o")
    right.set(xlabel="step", ylabel="token accuracy (validation)")
    return _finish(figure, "Supervised fine-tuning")


def plot_memory_strategies(
    strategies: Mapping[str, Mapping[str, float]], card_gb: float, title: str
) -> Figure:
    """Stacked bars of predicted bytes (strategy -> term -> bytes) against the card's line."""
    figure, (axis,) = _new_figure(height=4.8)
    terms = list(next(iter(strategies.values())))
    colours = plt.get_cmap("tab10")
    base = np.zeros(len(strategies))
    for index, term in enumerate(terms):
        sizes = np.array([strategy[term] for strategy in strategies.values()]) / 2**30
        axis.bar(range(len(sizes)), sizes, bottom=base, color=colours(index),
                 label=term.replace("_", " "), edgecolor="white", linewidth=0.5)  # fmt: skip
        base += sizes
    for place, total in enumerate(base):
        axis.text(place, total, f"{total:.1f}", ha="center", va="bottom")
    axis.axhline(card_gb, color=RED, linestyle="--")
    axis.text(
        len(base) - 0.5, card_gb, f" {card_gb:g} GiB card", color=RED, va="bottom", ha="right"
    )
    axis.set_xticks(range(len(base)), [name.replace("_", "\n") for name in strategies])
    axis.set_ylabel("predicted peak (GiB)")
    axis.legend(fontsize=9, ncols=2)
    return _finish(figure, title)


def plot_reference_logps(chosen: Sequence[float], rejected: Sequence[float]) -> Figure:
    """Distribution over pairs of the reference log-probability of both completions (nats).

    The axes span the middle 98 %: one odd completion would squeeze all others into a bin. What lies
    beyond is counted in the outermost bins.
    """
    figure, (left, right) = _new_figure(2)
    low, high = np.percentile([*chosen, *rejected], [1, 99])
    bins = np.linspace(low, high, 31)
    left.hist(np.clip(chosen, low, high), bins, color=GREEN, alpha=0.65, label="chosen")
    left.hist(
        np.clip(rejected, low, high), bins, color=RED, histtype="step", linewidth=2,
        label="rejected",
    )  # fmt: skip
    left.set(xlabel="log-probability of the completion (nats)", ylabel="pairs")
    left.legend()
    gaps = np.asarray(chosen) - np.asarray(rejected)
    right.hist(np.clip(gaps, *np.percentile(gaps, [1, 99])), 30, color=BLUE)
    right.axvline(0, color=GREY)
    right.set(xlabel="chosen minus rejected (nats)", ylabel="pairs")
    return _finish(figure, "What the reference thinks of each completion")


def plot_attention(seen: np.ndarray, lengths: Sequence[tuple[int, int, int]]) -> Figure:
    """Which token (row) reads which (column): `seen` is bool, (tokens, tokens).

    `lengths` holds (prompt, chosen, rejected) tokens of each pair of the row.
    """
    figure, (axis,) = _new_figure(height=6.2)
    parts = [part for pair in lengths for part in zip("PCR", pair, strict=True)]
    colour = {"P": 1, "C": 2, "R": 3}
    owner = np.repeat([colour[name] for name, _ in parts], [size for _, size in parts])
    shades = ListedColormap(["white", BLUE, GREEN, RED])
    axis.imshow(np.where(seen, owner[None, :], 0), cmap=shades, vmin=0, vmax=3)
    edges = np.cumsum([0, *(size for _, size in parts)]) - 0.5
    names = {"P": "prompt", "C": "chosen", "R": "rejected"}
    middles = (edges[1:] + edges[:-1]) / 2
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks(middles, [names[name] for name, _ in parts])
    axis.tick_params(axis="x", rotation=30)
    for edge in edges[1:-1]:
        axis.axhline(edge, color=GREY, linewidth=0.8)
        axis.axvline(edge, color=GREY, linewidth=0.8)
    axis.grid(False)
    axis.set(xlabel="what is read", ylabel="who reads")
    return _finish(figure, "Two pairs in one row: each prompt runs once")


def plot_pair_errors(chosen: Sequence[int], rejected: Sequence[int]) -> Figure:
    """Errors the judge saw per chosen and per rejected summary."""
    figure, (axis,) = _new_figure(height=3.4)
    values = np.arange(max([*chosen, *rejected, 1]) + 1)
    for errors, shift, colour, label in (
        (chosen, -0.2, GREEN, "chosen"), (rejected, 0.2, RED, "rejected")
    ):  # fmt: skip
        counts = [list(errors).count(value) for value in values]
        axis.bar(values + shift, counts, 0.38, color=colour, label=label)
    axis.set(xlabel="errors the judge saw", ylabel="summaries", xticks=values)
    axis.legend()
    return _finish(figure, "What the judge kept and what it turned down")


def plot_dpo_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss, rewards and margin over the steps of dpo/metrics.jsonl."""
    figure, (left, middle, right) = _new_figure(3)
    left.plot(*_series(rows, "dpo_loss"), color=BLUE, label="training", alpha=0.6)
    left.plot(
        *_series(rows, "eval_dpo_loss"),
        color=ORANGE,
        linestyle="--",
        marker="o",
        label="validation",
    )
    left.set(xlabel="step", title="DPO loss")
    left.axhline(math.log(2), color=GREY, linestyle=":", label="ln 2")
    left.legend(fontsize=9)
    for key, colour, style in (("chosen", GREEN, "-"), ("rejected", RED, "--")):
        middle.plot(
            *_series(rows, f"eval_rewards/{key}"), style, color=colour, marker="o", label=key
        )
    middle.plot(*_series(rows, "eval_rewards/margins"), color=BLUE, linestyle=":", label="margin")
    middle.set(xlabel="step", title="rewards (validation)")
    middle.legend(fontsize=9)
    right.plot(*_series(rows, "eval_rewards/accuracies"), color=BLUE, marker="o")
    right.set(xlabel="step", title="reward accuracy", ylim=(0, 1.05))
    return _finish(figure, "Sequential DPO")


def plot_guardrail(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Reward accuracy beside what the model really writes, per arm (arm -> metrics rows)."""
    panels = (
        ("eval_rewards/accuracies", "reward accuracy"),
        ("guardrail/hallucination_rate", "hallucinated summaries"),
        ("guardrail/omission_rate", "facts left out"),
    )
    figure, axes = _new_figure(len(panels), height=4.2)
    for axis, (key, title) in zip(axes, panels, strict=True):
        for arm, rows in arms.items():
            colour, line, label = SYSTEM_STYLE[arm]
            axis.plot(
                *_series(rows, key), line, color=colour, marker="o", markersize=4, label=label
            )
        axis.set(xlabel="step", title=title, ylim=(-0.03, 1.03))
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    _finish(figure, "The guardrail: what the margins do not show")
    figure.subplots_adjust(bottom=0.26)
    return figure


def plot_rates(systems: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Hallucination rate per system with its 95 % interval.

    `systems` maps a name to {"rate", "low", "high", "n"}.
    """
    figure, (axis,) = _new_figure(height=0.7 * len(systems) + 1.6)
    for place, (name, value) in enumerate(systems.items()):
        colour, _, label = SYSTEM_STYLE.get(name, (GREY, "-", name))
        axis.barh(place, value["rate"], color=colour, alpha=0.75)
        reach = [[value["rate"] - value["low"]], [value["high"] - value["rate"]]]
        axis.errorbar(value["rate"], place, xerr=reach, color="black", capsize=5)
        axis.text(value["high"] + 0.015, place, f"{value['rate']:.1%}", va="center")
        axis.text(-0.01, place, f"{label}  (n = {value['n']})", va="center", ha="right")
    axis.set(xlabel="summaries with at least one hallucination", xlim=(0, 1.05), yticks=[])
    axis.invert_yaxis()
    return _finish(figure, title)
