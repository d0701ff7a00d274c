"""Repeat the default run over seeds, write the figures to CSV, and put the table where it is read.

    python benchmarks/effect_over_seeds.py             # runs seeds 0, 1, 2 (stages that are current
                                                       # are reused), then writes CSV and tables
    python benchmarks/effect_over_seeds.py --report    # only rewrites the tables from the CSV

Each seed has its own data, SFT, pairs, DPO and held-out notes, in outputs/effect-seed-<seed>; the
default seed's are those of `make course`.
"""

from __future__ import annotations

import argparse
import platform

import pandas as pd
import torch
from blocks import replace_block

from hallulib.data import prepare_data
from hallulib.dpo.arms import train_comparison_arms
from hallulib.dpo.pairs import build_pairs
from hallulib.dpo.reference import cache_reference
from hallulib.dpo.train import train_dpo
from hallulib.evaluation import evaluate_systems
from hallulib.evaluation.metrics import PRIMARY
from hallulib.evaluation.report import format_p
from hallulib.files import project_root
from hallulib.recipe import load_recipe, parse_set
from hallulib.run import Run
from hallulib.sft import train_sft

ROOT = project_root()
CSV = ROOT / "benchmarks" / "effect_over_seeds.csv"
STAGES = (
    prepare_data, train_sft, build_pairs, cache_reference, train_dpo, train_comparison_arms,
)  # fmt: skip
LABELS = {
    "base": "base",
    "sft": "SFT",
    "sft_on_chosen": "SFT on the chosen (control)",
    "dpo_plain": "plain DPO",
    "dpo": "DPO + SFT term",
}


def run_seed(seed: int, overrides: dict) -> list[dict]:
    """Run every stage for one seed; return one row per system and style group."""
    recipe = load_recipe("tiny-cpu", overrides | {"seed": seed})
    is_default = recipe == load_recipe("tiny-cpu")
    run = Run.open("" if is_default else f"outputs/effect-seed-{seed}", recipe)
    for stage in STAGES:
        stage(recipe, run)
    summary = evaluate_systems(recipe, run).summary
    groups = {"all": summary["systems"]} | summary["by_style"]
    rows = [
        {"seed": seed, "styles": group, "system": name} | read_figures(figures)
        for group, systems in groups.items()
        for name, figures in systems.items()
    ]
    for row in rows:
        row |= read_p(summary, row["system"]) if row["styles"] == "all" else {}
        row |= {"pairs": run.manifest["stages"]["pairs"]["notes"]["train"]}
        row |= {"torch": torch.__version__, "machine": platform.machine()}
    return rows


def read_figures(figures: dict) -> dict:
    """The figures of one system that go into the CSV."""
    rate = figures["rates"][PRIMARY]
    return {
        "n": rate["n"], "hallucinated": rate["k"], "rate": rate["value"], "low": rate["low"],
        "high": rate["high"], "omission_rate": figures["omission_rate"],
        "answer_rate": figures["answer_rate"], "mean_words": figures["mean_words"],
        "unreadable_statements": figures["unparsed_statements"],
    }  # fmt: skip


def read_p(summary: dict, system: str) -> dict:
    """Exact McNemar p of SFT against this system, and of this system against DPO."""
    found = {(c["a"], c["b"]): c["paired"]["p_exact"] for c in summary["comparisons"]}
    return {"p_from_sft": found.get(("sft", system)), "p_to_dpo": found.get((system, "dpo"))}


def write_tables(frame: pd.DataFrame) -> None:
    """Put the table of all seeds into benchmarks/README.md and a short one into README.md."""
    replace_block(ROOT / "benchmarks" / "README.md", "effect_over_seeds", describe_all(frame))
    replace_block(ROOT / "README.md", "effect_over_seeds", describe_short(frame))


def describe_short(frame: pd.DataFrame) -> str:
    """Markdown: hallucinated summaries per system, every seed, all styles."""
    overall = frame[frame["styles"] == "all"]
    seeds = sorted(overall["seed"].unique())
    heads = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [
        f"Summaries with at least one hallucination, of {overall['n'].max()} held-out notes",
        "(95 % Wilson interval), and the share of the notes' facts left out:",
        "",
        f"| | {heads} | left out |",
        "|---|" + "---|" * (len(seeds) + 1),
    ]
    for system, label in LABELS.items():
        rows = overall[overall["system"] == system].sort_values("seed")
        cells = [f"{r.rate:.1%} ({r.low:.1%}-{r.high:.1%})" for r in rows.itertuples()]
        left_out = f"{rows['omission_rate'].min():.1%}-{rows['omission_rate'].max():.1%}"
        lines.append(f"| {label} | {' | '.join(cells)} | {left_out} |")
    dpo = overall[overall["system"] == "sft_on_chosen"]["p_to_dpo"].max()
    sft = overall[overall["system"] == "dpo"]["p_from_sft"].max()
    lines += ["", f"Exact McNemar, the worst of the seeds: SFT against DPO {format_p(sft)}, "
              f"control against DPO {format_p(dpo)}."]  # fmt: skip
    return "\n".join(lines)


def describe_all(frame: pd.DataFrame) -> str:
    """Markdown: every row of the CSV, by style group."""
    machine = ", ".join(frame["machine"].unique())
    parts = [
        "## The effect, over seeds", "",
        f"`python benchmarks/effect_over_seeds.py`, recipe `tiny-cpu`, CPU ({machine}), torch "
        f"{frame['torch'].iloc[0]}. Each seed draws its own notes, for training and test. Rates: "
        "summaries with at least one hallucination, judged by the exact checker. Unreadable: "
        "statements, garbled ones mostly, that it cannot read and does not count as wrong.", "",
    ]  # fmt: skip
    for group in frame["styles"].unique():
        part = frame[frame["styles"] == group]
        parts += [
            f"### Styles: {group.replace('_', ' ')}", "",
            "| seed | system | hallucinated | rate | 95 % interval | left out | answered | words "
            "| unreadable |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        parts += [
            f"| {r.seed} | {LABELS[r.system]} | {r.hallucinated} of {r.n} | {r.rate:.1%} | "
            f"{r.low:.1%}-{r.high:.1%} | {r.omission_rate:.1%} | {r.answer_rate:.1%} | "
            f"{r.mean_words:.1f} | {r.unreadable_statements} |"
            for r in part.itertuples()
        ] + [""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="recipe settings, as dpo.beta=0.2")
    parser.add_argument("--report", action="store_true", help="only rewrite the tables")
    options = parser.parse_args()
    if not options.report:
        rows = [row for seed in options.seeds for row in run_seed(seed, parse_set(options.set))]
        pd.DataFrame(rows).to_csv(CSV, index=False, float_format="%.6g")
    write_tables(pd.read_csv(CSV))
    print(describe_short(pd.read_csv(CSV)))


if __name__ == "__main__":
    main()
