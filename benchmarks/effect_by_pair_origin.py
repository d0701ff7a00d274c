"""What pairs of each origin do to the result, by their number: DPO beside SFT on the chosen.

    python benchmarks/effect_by_pair_origin.py             # seeds 0, 1, 2; finished runs are reused
    python benchmarks/effect_by_pair_origin.py --report    # only redraws figure and table

Every run of a seed starts from the same data and the same SFT adapter and takes the same number of
steps, so only the pairs differ. Sampled pairs are the policy's own; perturbed ones and twins are
made of references in which the judge found no error.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from blocks import replace_block
from effect_over_seeds import read_figures
from matplotlib.figure import Figure

from hallulib.data import prepare_data
from hallulib.dpo import build_pairs, cache_reference, train_comparison_arms, train_dpo
from hallulib.evaluation import evaluate_systems
from hallulib.files import project_root
from hallulib.recipe import load_recipe, parse_set
from hallulib.run import Run
from hallulib.sft import train_sft

ROOT = project_root()
CSV = ROOT / "benchmarks" / "effect_by_pair_origin.csv"
STAGES = (build_pairs, cache_reference, train_dpo, train_comparison_arms)
# origin -> notes drawn per pair wanted: most notes give a sampled pair, but about a fifth of the
# references only is without an error for the judge
ORIGINS = {"sampled": 2, "perturbed": 6, "twin": 6}
LABELS = {"dpo": "DPO + SFT term", "sft_on_chosen": "SFT on the chosen"}
_LINES = {"dpo": "-", "sft_on_chosen": "--"}
_COLOURS = {"sampled": "tab:green", "perturbed": "tab:orange", "twin": "tab:purple"}
_PANELS = (("rate", "hallucinated summaries"), ("omission_rate", "facts left out"))


def start_seed(seed: int, overrides: dict) -> Path:
    """The folder of a run of this seed in which data and SFT are finished."""
    recipe = load_recipe("tiny-cpu", overrides | {"seed": seed})
    run = Run.open(f"outputs/origin-{seed}", recipe)
    prepare_data(recipe, run)
    train_sft(recipe, run)
    return run.root


def run_origin(start: Path, seed: int, origin: str, pairs: int, overrides: dict) -> list[dict]:
    """Make `pairs` pairs of an origin, train both arms on them, evaluate; one row per system."""
    settings = {"pairs.notes": pairs * ORIGINS[origin]} | overrides
    settings |= {"seed": seed, "pairs.origin": origin, "pairs.max_pairs": pairs}
    settings |= {"dpo.comparison_arms": ["sft_on_chosen"]}
    recipe = load_recipe("tiny-cpu", settings)
    folder = start.with_name(f"{start.name}-{origin}-{pairs}")
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(start, partial)
        partial.rename(folder)
    run = Run.open(folder, recipe)
    for stage in (prepare_data, train_sft, *STAGES):  # the first two are there and are reused
        stage(recipe, run)
    made = run.manifest["stages"]["pairs"]["notes"]
    about = {"seed": seed, "origin": origin, "pairs": made["train"] + made["validation"],
             "asked": pairs, "yield": made["yield"],
             "token_gap": made["length_bias"]["mean_gap"]}  # fmt: skip
    systems = evaluate_systems(recipe, run).summary["systems"]
    return [about | {"system": name} | read_figures(f) for name, f in systems.items()]


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


def describe(frame: pd.DataFrame) -> str:
    """Markdown: every run, with what its pairs were like."""
    seeds = ", ".join(map(str, sorted(frame["seed"].unique())))
    lines = [
        "## The effect, by the origin of the pairs", "",
        f"`python benchmarks/effect_by_pair_origin.py`, recipe `tiny-cpu`, seeds {seeds}. All runs "
        "of a seed start from the same SFT adapter and take equally many steps. Gap: tokens by "
        "which the rejected side is longer.", "",
        "![rate and omissions by pairs](effect_by_pair_origin.png)", "",
        "| seed | origin | pairs | yield | gap | system | hallucinated | rate | 95 % interval "
        "| left out | words |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    shown = frame[frame["system"].isin(["sft", *LABELS])]
    lines += [
        f"| {r.seed} | {r.origin} | {r.pairs} | {r.share:.0%} | {r.token_gap:+.2f} | "
        f"{LABELS.get(r.system, 'SFT')} | {r.hallucinated} of {r.n} | {r.rate:.1%} | "
        f"{r.low:.1%}-{r.high:.1%} | {r.omission_rate:.1%} | {r.mean_words:.1f} |"
        for r in shown.rename(columns={"yield": "share"}).itertuples()
    ]
    return "\n".join(lines)


def summarise(frame: pd.DataFrame) -> str:
    """Markdown: the rates over the seeds, by origin and number of pairs."""
    seeds = frame["seed"].nunique()
    lines = [
        "![rate and omissions by origin and number of pairs](benchmarks/effect_by_pair_origin.png)",
        "", f"Hallucinated summaries, mean of {seeds} seeds (lowest-highest):", "",
        "| pairs | number | " + " | ".join(LABELS.values()) + " |", "|---|---|---|---|",
    ]  # fmt: skip
    for (origin, asked), part in frame.groupby(["origin", "asked"], sort=False):
        rates = [part[part["system"] == name]["rate"] for name in LABELS]
        cells = [f"{r.mean():.1%} ({r.min():.1%}-{r.max():.1%})" for r in rates]
        lines.append(f"| {origin} | {asked} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, nargs="+", default=[50, 150, 450])
    parser.add_argument("--set", nargs="*", default=[], help="recipe settings, as dpo.beta=0.2")
    parser.add_argument("--csv", type=Path, default=CSV, help="figure and README follow its name")
    parser.add_argument("--report", action="store_true", help="only redraw figure and table")
    options = parser.parse_args()
    if not options.report:
        rows: list[dict] = []
        for seed in options.seeds:
            start = start_seed(seed, parse_set(options.set))
            for origin in ORIGINS:
                for pairs in options.pairs:
                    rows += run_origin(start, seed, origin, pairs, parse_set(options.set))
                    pd.DataFrame(rows).to_csv(options.csv, index=False, float_format="%.6g")
    frame = pd.read_csv(options.csv)
    plot_effect_by_origin(frame).savefig(options.csv.with_suffix(".png"), dpi=110)
    if options.csv == CSV:
        replace_block(ROOT / "benchmarks" / "README.md", CSV.stem, describe(frame))
        replace_block(ROOT / "README.md", CSV.stem, summarise(frame))
    print(describe(frame))


if __name__ == "__main__":
    main()
