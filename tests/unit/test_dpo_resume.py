"""DPO killed at an arbitrary step by a real `kill -9`, and continued to the same bits."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_dpo import reference_run, weights

from hallulib.dpo.train import train_dpo
from hallulib.metrics_log import read_metrics

pytestmark = pytest.mark.unit

# Ten pairs, four a step: an epoch ends within step 3, the next within step 5.
SETTINGS = {"dpo.guardrail_notes": 0}
CODE = """
import sys, time
from tiny_model import make_recipe
from hallulib.dpo.train import train_dpo
from hallulib.metrics_log import MetricsLog
from hallulib.run import Run
real = MetricsLog.on_step_end
MetricsLog.on_step_end = lambda *a, **k: (time.sleep(0.5), real(*a, **k))[1]
recipe = make_recipe({settings!r}, base={base!r})
train_dpo(recipe, Run.open({root!r}, recipe))
"""


def kill_after_step(step: int, recipe, run) -> None:
    """Start DPO in a process of its own and kill it once it has logged `step`."""
    code = CODE.format(
        settings=SETTINGS, base=recipe.model.name_or_path, root=str(run.root)
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    log = run.checkpoint_dir("dpo", recipe) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step and "loss" in row for row in read_metrics(log)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    recipe, run = reference_run(tmp_path_factory.mktemp("straight") / "run", SETTINGS)
    train_dpo(recipe, run)
    return run


@pytest.mark.parametrize(("step", "resumed"), [(1, None), (3, "checkpoint-2"), (5, "checkpoint-4")])
def test_a_run_killed_at_a_step_continues_to_exactly_the_same_weights(
    tmp_path, capsys, straight, step, resumed
):
    recipe, run = reference_run(tmp_path / "run", SETTINGS)
    kill_after_step(step, recipe, run)
    assert "dpo" not in run.manifest["stages"]
    train_dpo(recipe, run)
    out = capsys.readouterr().out
    assert f"{resumed}" in out if resumed else "resuming" not in out
    a, b = weights(straight), weights(run)
    assert all(torch.equal(a[name], b[name]) for name in a)
    # The record reads as if there had been no interruption.
    assert read_metrics(straight.path("dpo/metrics.jsonl")) == read_metrics(
        run.path("dpo/metrics.jsonl")
    )
