"""DPO stopped at an arbitrary step by a real `kill -9`, and continued to the same bits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_dpo import reference_run, same_weights, weights

from hallulib.dpo.train import train_dpo
from hallulib.files import read_jsonl

pytestmark = pytest.mark.unit

# Ten pairs, four a step: an epoch ends within step 3, the next within step 5.
SETTINGS = {"dpo.guardrail_notes": 0}
CODE = """
import time
from tiny_model import make_recipe
from hallulib.checkpoints import Log
from hallulib.dpo.train import train_dpo
from hallulib.run import Run
real = Log.write
Log.write = lambda *a: (real(*a), time.sleep(0.5))[0]
recipe = make_recipe({settings!r}, base={base!r})
train_dpo(recipe, Run.open({root!r}, recipe))
"""


def stop_after_step(step: int, recipe, run, number: int) -> int:
    """Start DPO in a process of its own and send it a signal once it has logged `step`."""
    code = CODE.format(settings=SETTINGS, base=recipe.model.name_or_path, root=str(run.root))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    log, logged = run.checkpoint_dir("dpo", recipe) / "metrics.jsonl", []
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step and "grad_norm" in row for row in logged):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        logged = [json.loads(line) for line in lines]  # the whole ones: it is being written
    process.send_signal(number)
    return process.wait()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    recipe, run = reference_run(tmp_path_factory.mktemp("straight") / "run", SETTINGS)
    train_dpo(recipe, run)
    return run


@pytest.mark.parametrize(
    ("step", "number", "resumed"),
    [
        (1, signal.SIGKILL, None),
        (3, signal.SIGKILL, "checkpoint-2"),
        (5, signal.SIGKILL, "checkpoint-4"),
        (5, signal.SIGTERM, "checkpoint-5"),  # a step that was not due to be saved
    ],
)
def test_a_run_stopped_at_a_step_continues_to_exactly_the_same_weights(
    tmp_path, capsys, straight, step, number, resumed
):
    recipe, run = reference_run(tmp_path / "run", SETTINGS)
    code = stop_after_step(step, recipe, run, number)
    assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert "dpo" not in run.manifest["stages"]
    train_dpo(recipe, run)
    out = capsys.readouterr().out
    assert resumed in out if resumed else "resuming" not in out
    assert same_weights(weights(straight), weights(run))
    # The record reads as if there had been no interruption.
    logs = [read_jsonl(each.path("dpo/metrics.jsonl")) for each in (straight, run)]
    assert logs[0] == logs[1]
