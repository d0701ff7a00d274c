"""The figure of benchmarks/effect_by_pair_origin.csv: what pairs of each origin do."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

LABELS = {"dpo": "DPO + SFT term", "sft_on_chosen": "SFT on the chosen"}
_LINES = {"dpo": "-", "sft_on_chosen": "--"}
_COLOURS = {"sampled": "tab:green", "perturbed": "tab:orange", "twin": "tab:purple"}
_PANELS = (("rate", "hallucinated summaries"), ("omission_rate", "facts left out"))


def plot_effect_by_origin(frame: pd.DataFrame) -> Figure:
    """Rate and omissions over the number of pairs, a line per origin and system: the mean of the
    seeds, with bars from the lowest to the highest. Columns: origin, system, asked, pairs, rate,
    omission_rate."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, (column, title) in zip(axes, _PANELS, strict=True):
        for (origin, system), part in frame[frame["system"].isin(LABELS)].groupby(
            ["origin", "system"], sort=False
        ):
            spread = part.groupby("asked")[column].agg(["mean", "min", "max"])
            aside = 1 + 0.03 * (list(_COLOURS).index(origin) - 1)  # bars beside, not on, each other
            axis.errorbar(
                aside * part.groupby("asked")["pairs"].mean(), spread["mean"],
                yerr=[spread["mean"] - spread["min"], spread["max"] - spread["mean"]],
                capsize=4, marker="o", linestyle=_LINES[system], color=_COLOURS[origin],
                label=f"{origin}, {LABELS[system]}",
            )  # fmt: skip
        start = frame[frame["system"] == "sft"][column].mean()
        axis.axhline(start, color="grey", linestyle=":", label="SFT, where all start")
        ticks = sorted(frame["asked"].unique())
        axis.set(xlabel="pairs", title=title, xscale="log")
        axis.set_ylim(0, 1.05 * max(start, axis.get_ylim()[1]))
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.yaxis.set_major_formatter("{x:.2%}" if column == "omission_rate" else "{x:.0%}")
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    plt.close(figure)  # returned to be shown, once
    return figure
