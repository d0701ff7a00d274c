"""Sequential DPO beside TRL on the same work: time per step, memory, and the same losses.

    python benchmarks/dpo_vs_trl.py            # all arms, interleaved; writes CSV, table and figure
    python benchmarks/dpo_vs_trl.py --report   # only rewrites table and figure from the CSV

Every arm runs in a process of its own with one thread, on the same pairs in the same order, from
the same initial adapter. TRL is set up so that it does the same sums: float32, no checkpointing,
precomputed reference, constant rate. "TRL, completions only" is TRL with one line changed, so that
on a CPU too it runs the head on completion tokens only; it is the fair peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from blocks import replace_block
from dpo_workloads import MODELS, WORKLOADS, count_weights, write_workload

from hallulib.files import project_root

HERE = project_root() / "benchmarks"
CSV = HERE / "dpo_vs_trl.csv"
ARMS = {
    "trl_stock": "TRL 1.16, as it comes",
    "trl_patched": "TRL 1.16, completions only",
    "ours_plain": "hallulib, prompt twice",
    "ours_shared": "hallulib, prompt once",
}
PARITY_STEPS = 6


def run_arm(arm: str, folder: Path, steps: int) -> dict:
    """Run one arm in a fresh process with one thread; return what it measured."""
    single = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    quiet = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    cache = {"HF_DATASETS_CACHE": str(folder / f"datasets-{arm}-{os.urandom(4).hex()}")}
    command = [sys.executable, str(HERE / "dpo_arms.py"), arm, str(folder), str(steps)]
    done = subprocess.run(
        command, env=os.environ | single | quiet | cache, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_workload(model: str, ratio: int, steps: int, rounds: int) -> list[dict]:
    """Run every arm `rounds` times, interleaved; return one row per run."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_workload(model, ratio, steps, folder)
        for number in range(rounds):
            for arm in ARMS:
                found = run_arm(arm, folder, steps)
                losses = found.pop("losses")[:PARITY_STEPS]
                rows.append(
                    {"model": model, "ratio": ratio, "arm": arm, "round": number}
                    | tokens | found | {"losses": json.dumps(losses)}
                )  # fmt: skip
                print(model, f"{ratio}:1", ARMS[arm], f"{found['step_seconds']:.2f} s", flush=True)
    return rows


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per workload and arm: medians over rounds, ratios to the other arms, parity."""
    rows = []
    for (model, ratio), part in frame.groupby(["model", "ratio"], sort=False):
        medians = part.groupby("arm")[["step_seconds", "reference_seconds", "added_mb"]].median()
        oracle = json.loads(part[part["arm"] == "trl_stock"]["losses"].iloc[0])
        for arm in ARMS:
            own, mid = part[part["arm"] == arm], medians.loc[arm]
            differs = [
                abs(a - b)
                for losses in own["losses"]
                for a, b in zip(json.loads(losses), oracle, strict=True)
            ]
            prompt, completion = own["prompt_tokens"].iloc[0], own["completion_tokens"].iloc[0]
            rows.append(
                {
                    "model": model, "ratio": ratio, "arm": arm,
                    "step_seconds": mid["step_seconds"],
                    "reference_seconds": mid["reference_seconds"], "added_mb": mid["added_mb"],
                    "times_stock": medians.loc["trl_stock", "step_seconds"] / mid["step_seconds"],
                    "times_patched": medians.loc["trl_patched", "step_seconds"]
                    / mid["step_seconds"],
                    "times_plain": medians.loc["ours_plain", "step_seconds"] / mid["step_seconds"],
                    "reference_times_stock": medians.loc["trl_stock", "reference_seconds"]
                    / mid["reference_seconds"],
                    "memory_of_patched": mid["added_mb"] / medians.loc["trl_patched", "added_mb"],
                    "ideal": 2 * (prompt + completion) / (prompt + 2 * completion),
                    "loss_differs": max(differs),
                    "cache_bytes_per_pair": own["cache_bytes_per_pair"].median(),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def describe(frame: pd.DataFrame) -> str:
    """The section for benchmarks/README.md."""
    first = frame.iloc[0]
    rounds = frame["round"].max() + 1
    lines = [
        "## DPO beside TRL", "",
        f"`python benchmarks/dpo_vs_trl.py`: CPU, one thread, torch {first['torch']}, transformers "
        f"{first['transformers']}, TRL {first['trl']}; medians of {rounds} interleaved runs, "
        f"{first['pairs_per_step']} pairs a step, LoRA r=8 on all linear layers, float32. "
        "Seconds are CPU time. Added memory is the peak over what was resident before training. "
        f"Loss: largest difference to TRL over the first {PARITY_STEPS} steps. Ideal: tokens of "
        "the plain layout over tokens of the shared one.", "",
    ]  # fmt: skip
    for model, part in summarise(frame).groupby("model", sort=False):
        lines += [
            f"### {MODELS[model].title}", "",
            "| prompt:completion | arm | s a step | speed, TRL = 1 | speed, completions only = 1 "
            "| speed, prompt twice = 1 (ideal) | reference pass, s (speed) | added MB | loss |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for r in part.itertuples():
            ideal = f" ({r.ideal:.2f})" if r.arm == "ours_shared" else ""
            lines.append(
                f"| {r.ratio}:1 | {ARMS[r.arm]} | {r.step_seconds:.2f} | {r.times_stock:.2f} | "
                f"{r.times_patched:.2f} | {r.times_plain:.2f}{ideal} | {r.reference_seconds:.1f} "
                f"({r.reference_times_stock:.2f}) | {r.added_mb:.0f} | {r.loss_differs:.1e} |"
            )
        lines += ["", describe_ceiling(model, part), ""]
    return "\n".join(lines) + "![speed](dpo_vs_trl.png)\n"


def describe_ceiling(model: str, part: pd.DataFrame) -> str:
    """What the count of multiplications allows at most over TRL as it comes."""
    layers, head = count_weights(model)
    reached = part[part["arm"] == "ours_shared"].set_index("ratio")["times_stock"]
    lines = []
    for ratio in part["ratio"].unique():
        prompt, completion = ratio, 1.0
        stock = 2 * (prompt + completion) * (layers + head)
        ours = (prompt + 2 * completion) * layers + 2 * completion * head
        lines.append(f"{ratio}:1 {stock / ours:.2f} (reached {reached[ratio]:.2f})")
    return (
        f"Most that fewer multiplications with weights can bring over TRL as it comes: "
        f"{', '.join(lines)}. The head holds {head / (layers + head):.0%} of the weights that a "
        "token is multiplied with. Attention is not counted; what is reached beyond that is not "
        "arithmetic (memory written and read, overhead) and is not taken apart here."
    )


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Speed of each arm against the fair peer, by workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = summarise(frame)
    models = list(dict.fromkeys(table["model"]))
    figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 3.6), sharey=True)
    for axis, model in zip(axes, models, strict=True):
        part = table[table["model"] == model]
        for place, arm in enumerate(ARMS):
            values = part[part["arm"] == arm]["times_patched"].to_numpy()
            places = [i + 0.2 * (place - 1.5) for i in range(len(values))]
            axis.bar(places, values, 0.18, label=ARMS[arm])
        axis.axhline(1, color="0.4", linewidth=1)
        labels = [f"{ratio}:1" for ratio in part["ratio"].unique()]
        axis.set_xticks(range(len(labels)), labels)
        axis.set(title=MODELS[model].title, xlabel="prompt : completion")
    axes[0].set_ylabel("speed, TRL completions only = 1")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write_report(frame: pd.DataFrame) -> None:
    """Put table and figure into benchmarks/README.md."""
    plot(frame, HERE / "dpo_vs_trl.png")
    replace_block(HERE / "README.md", "dpo_vs_trl", describe(frame))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="two of them are warm-up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only rewrite table and figure")
    options = parser.parse_args()
    if not options.report:
        rows = [
            row
            for model in MODELS
            for ratio in WORKLOADS
            for row in run_workload(model, ratio, options.steps, options.rounds)
        ]
        pd.DataFrame(rows).to_csv(CSV, index=False, float_format="%.6g")
    frame = pd.read_csv(CSV)
    write_report(frame)
    for row in summarise(frame).itertuples():
        print(f"{row.model} {row.ratio}:1 {ARMS[row.arm]:28} {row.times_patched:.2f}x "
              f"loss differs by {row.loss_differs:.1e}")  # fmt: skip
    print("median speed of the shared prompt over the plain layout:", round(statistics.median(
        summarise(frame).query("arm == 'ours_shared'")["times_plain"]), 2))  # fmt: skip


if __name__ == "__main__":
    main()
