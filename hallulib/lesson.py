"""What notebooks need beside the stages: settings, metrics, what passed, and a plug to pull."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from hallulib.errors import HallulibError
from hallulib.files import read_jsonl as read_jsonl
from hallulib.files import write_json_atomic
from hallulib.recipe import Recipe
from hallulib.recipe import load_recipe as load_recipe
from hallulib.run import Run


def show_settings(config: Recipe, *sections: str) -> pd.DataFrame:
    """A table of the effective settings of some recipe sections, with what each one means."""
    rows = {}
    for section in sections:
        fields = type(getattr(config, section)).model_fields
        for name, value in getattr(config, section):
            rows[f"{section}.{name}"] = [repr(value), fields[name].description]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "meaning"])
    return table.rename_axis("setting")


def print_passed(what: str) -> None:
    """The green line at the end of a checkpoint cell."""
    print(f"\x1b[32mcheckpoint passed: {what}\x1b[0m")


def print_cost(run: Run, stage: str) -> None:
    """Measured time and peak memory of a finished stage, from the manifest."""
    record = run.manifest["stages"][stage]
    peak = record["peak_memory_bytes"] / 2**30
    print(f"{stage}: {record['wall_seconds']:.0f} s, peak {peak:.2f} GiB on {record['device']}")


def copy_run(run: Run, folder: Path, recipe: Recipe, without: str) -> Run:
    """A copy of a run to try things on, in place of an older copy: without the folder `without`,
    checkpoints and what comes after DPO."""
    shutil.rmtree(folder, ignore_errors=True)
    later = ("checkpoints", "trials", "tensorboard", "notebooks", "evaluation", "assessment")
    shutil.copytree(run.root, folder, ignore=shutil.ignore_patterns(without, *later))
    return Run.open(folder, recipe)


def kill_stage(stage: str, recipe: Recipe, run: Run, once: str) -> None:
    """Start a stage in a process of its own and kill it, without warning, as soon as a file is
    there that matches `once` (a pattern below the run)."""
    file = run.path("recipe.yaml")
    write_json_atomic(file, recipe.to_dict())  # JSON is YAML
    command = [sys.executable, "-m", "hallulib", "run-stage", stage, "--recipe", file]
    command += ["--run-dir", run.root]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not any(run.root.glob(once)):
        if process.poll() is not None:
            said = process.communicate()[1].decode()[-500:]
            raise HallulibError(f"Stage '{stage}' ended by itself: {said}", "See the words above.")
        time.sleep(0.02)
    process.kill()
    process.communicate()
