"""What notebooks need beside the stages: settings, metrics, what passed, and a plug to pull."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import yaml

from hallulib.errors import HallulibError
from hallulib.files import read_jsonl as read_jsonl
from hallulib.recipe import Recipe
from hallulib.recipe import load_recipe as load_recipe
from hallulib.run import Run


def show_settings(config: Recipe, *sections: str) -> pd.DataFrame:
    """A table of the effective settings of some recipe sections, with what each one means."""
    rows = []
    for section in sections:
        values = getattr(config, section)
        for name, info in type(values).model_fields.items():
            rows.append((f"{section}.{name}", repr(getattr(values, name)), info.description))
    return pd.DataFrame(rows, columns=["setting", "value", "meaning"]).set_index("setting")


def print_passed(what: str) -> None:
    """The green line at the end of a checkpoint cell."""
    print(f"\x1b[32mcheckpoint passed: {what}\x1b[0m")


def print_cost(run: Run, stage: str) -> None:
    """Measured time and peak memory of a finished stage, from the manifest."""
    record = run.manifest["stages"][stage]
    peak = record["peak_memory_bytes"] / 2**30
    print(f"{stage}: {record['wall_seconds']:.0f} s, peak {peak:.2f} GiB on {record['device']}")


def copy_run(run: Run, folder: Path, recipe: Recipe, without: str) -> Run:
    """A copy of a run to try things on, in place of an older copy.

    The folder named in `without` stays behind, and so do checkpoints and what comes after DPO.
    """
    shutil.rmtree(folder, ignore_errors=True)
    later = ("checkpoints", "trials", "tensorboard", "notebooks", "evaluation", "assessment")
    shutil.copytree(run.root, folder, ignore=shutil.ignore_patterns(without, *later))
    return Run.open(folder, recipe)


def kill_stage(stage: str, recipe: Recipe, run: Run, once: str) -> None:
    """Start a stage in a process of its own and kill it, without warning, as soon as a file is
    there that matches `once` (a pattern below the run)."""
    file = run.root / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    command = ["-m", "hallulib", "run-stage", stage, "--recipe", str(file)]
    process = subprocess.Popen(
        [sys.executable, *command, "--run-dir", str(run.root)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not any(run.root.glob(once)):
        if process.poll() is not None:
            raise HallulibError(
                f"Stage '{stage}' ended by itself: {process.communicate()[1][-500:]}",
                "Read the message above; the stage did not come as far as it was to be killed.",
            )
        time.sleep(0.02)
    process.kill()
    process.communicate()
