"""The arms DPO is compared with: same start, pairs, order and number of steps, another loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hallulib.dpo.step import Arm
from hallulib.dpo.train import DpoResult, train_arm
from hallulib.files import display_path, sha256_tree, storage_guard, write_json_atomic
from hallulib.processes import is_main_process
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage

ARMS = {
    "dpo_plain": Arm("dpo_plain", preference=True, sft_weight=0.0),
    "sft_on_chosen": Arm("sft_on_chosen", preference=False, sft_weight=1.0),
}
FINISHED = "finished.json"


class ComparisonResult(dict[str, DpoResult]):
    """Arm name -> its result; `notes` is what goes into the manifest."""

    @property
    def notes(self) -> dict:
        return {"arms": {name: result.notes for name, result in self.items()}}


def load_comparison_results(run: Run) -> ComparisonResult:
    """Read the results of finished arms back from the run."""
    arms = run.manifest["stages"]["comparison"]["notes"]["arms"]
    root = run.path("dpo/arms")
    return ComparisonResult({name: _read_arm(root / name, notes) for name, notes in arms.items()})


@stage("comparison", load=load_comparison_results, parallel=True)
def train_comparison_arms(recipe: Recipe, run: Run) -> ComparisonResult:
    """Train the arms of `dpo.comparison_arms`; writes dpo/arms/<arm>/{adapter, metrics.jsonl}.

    After an interruption a finished arm is kept and a half-done one resumes.
    """
    root, checkpoints = run.path("dpo/arms"), run.checkpoint_dir("comparison", recipe)
    with storage_guard(root):
        root.mkdir(parents=True, exist_ok=True)
        for old in root.iterdir() if is_main_process() else ():
            if old.name not in recipe.dpo.comparison_arms:
                shutil.rmtree(old)
    results = ComparisonResult()
    for name in recipe.dpo.comparison_arms:
        notes = _read_finished(root / name, checkpoints / name)
        if notes is None:
            notes = train_arm(recipe, run, ARMS[name], root / name, checkpoints / name).notes
            if is_main_process():
                finished = {"sha256": sha256_tree(root / name), "notes": notes}
                write_json_atomic(checkpoints / name / FINISHED, finished)
        else:
            print(f"comparison: {name} is finished, reusing {display_path(root / name)}")
        results[name] = _read_arm(root / name, notes)
    return results


def _read_arm(folder: Path, notes: dict) -> DpoResult:
    return DpoResult(folder / "adapter", notes["metrics"], notes["reference_key"], notes)


def _read_finished(folder: Path, checkpoints: Path) -> dict | None:
    """The notes of an arm that this very stage key has finished, if its files are still those."""
    try:
        finished = json.loads((checkpoints / FINISHED).read_text("utf-8"))
        return finished["notes"] if sha256_tree(folder) == finished["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None
