"""The command line: thin, and every error of ours in plain words with status 2."""

import importlib
import json
import subprocess
import sys
import types

import pytest
import yaml
from run_factory import change, finish

from hallulib import cli
from hallulib.recipe import load_recipe
from hallulib.run import Run
from hallulib.stages import STAGES

pytestmark = pytest.mark.unit


def call(capsys, *arguments):
    """Run the command line in this process: (status, stdout, stderr)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """outputs/ and relative run folders are below tmp_path."""
    for module in ("hallulib.run", "hallulib.report", "hallulib.cli"):
        monkeypatch.setattr(f"{module}.resolve_path", lambda path: tmp_path / path)
    return tmp_path / "outputs"


def make_run(outputs, name, rate=None, **overrides):
    run = Run.open(outputs / name, change(**overrides))
    if rate is not None:
        system = {"n": 300, "hallucination_rate": rate, "interval": [rate - 0.01, rate + 0.01]}
        system |= {"omission_rate": 0.0, "answer_rate": 1.0}
        path = run.path("evaluation/summary.json")
        path.parent.mkdir()
        path.write_text(json.dumps({"systems": {"dpo": system}}))
    return run


def test_help_lists_the_commands(capsys):
    status, out, _ = call(capsys, "--help")
    names = "course run-stage runs compare recipe plan gallery assess fetch".split()
    assert status == 0 and all(name in out for name in names)


def test_a_recipe_is_printed_as_yaml_that_loads_to_the_same_recipe(capsys, tmp_path):
    status, out, _ = call(capsys, "recipe", "tiny-cpu", "--set", "dpo.beta=0.2", "--set", "seed=3")
    (tmp_path / "copy.yaml").write_text(out)
    assert status == 0 and yaml.safe_load(out)["dpo"]["beta"] == 0.2
    assert load_recipe(str(tmp_path / "copy.yaml")) == change(dpo__beta=0.2, seed=3)


def test_an_error_of_ours_is_printed_without_a_traceback_and_ends_with_status_2():
    command = [sys.executable, "-m", "hallulib", "course", "--set", "dpo.betta=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'dpo.beta'?\nNext: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_options_of_course_reach_the_runner(capsys, monkeypatch):
    seen = {}
    monkeypatch.setattr("hallulib.course.run_course", lambda *a, **named: seen.update(named, a=a))
    call(capsys, *"course --recipe r --run-dir d --set a.b=1 --from 04 --force".split())
    options = {"from_notebook": "04", "only": "", "force": True}
    assert seen == options | {"a": ("r", "d", {"a.b": "1"})}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(28, "No space left on device", "x"), 2,
         "\nError: [Errno 28] No space left on device: 'x'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)  # fmt: skip
def test_a_full_disk_is_printed_in_one_line_and_ctrl_c_ends_with_130(
    capsys, monkeypatch, error, status, said
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("hallulib.course.run_course", fail)
    assert call(capsys, "course")[::2] == (status, said)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_function(stage):
    module, function = STAGES[stage].door.split(":")
    assert callable(getattr(importlib.import_module(f"hallulib.{module}"), function))


def test_run_stage_calls_its_function_with_recipe_and_run_and_forgets_first_with_force(
    capsys, monkeypatch, outputs
):
    run = Run.open(outputs / "tiny-cpu", load_recipe("tiny-cpu"))
    finish(run, load_recipe("tiny-cpu"), "data")
    calls = []

    def prepare_data(recipe, run):
        calls.append((recipe.seed, run.root, "data" in run.manifest["stages"]))

    module = types.SimpleNamespace(prepare_data=prepare_data)
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    assert call(capsys, "run-stage", "data", "--set", "seed=5")[0] == 0
    call(capsys, "run-stage", "data", "--force")
    assert calls == [(5, run.root, True), (0, run.root, False)]


def test_runs_are_listed_with_their_headline_and_a_damaged_one_does_not_hide_the_others(
    capsys, outputs
):
    assert call(capsys, "runs")[:2] == (0, "No runs yet.\n")
    make_run(outputs, "b")
    make_run(outputs, "a", rate=0.03)
    make_run(outputs, "c", rate=0.5).path("evaluation/summary.json").write_text("{")
    (outputs / "gallery").mkdir()
    status, out, _ = call(capsys, "runs")
    a, b, c = out.strip().split("\n\n")
    assert status == 0 and [a[0], b[0], c[0]] == ["a", "b", "c"]
    assert "dpo" in a and "3.0 %" in a and "300" in a
    assert "not evaluated yet" in b and "unreadable" in c and "06_evaluation" in c


def test_two_runs_are_compared_side_by_side(capsys, outputs):
    make_run(outputs, "a", rate=0.03)
    make_run(outputs, "b", rate=0.60, dpo__beta=0.2, seed=3)
    status, out, _ = call(capsys, "compare", "a", "b")
    rows = [line.split() for line in out.splitlines()]
    assert status == 0
    assert [row for row in rows if row[0] == "recipe"] == [
        ["recipe", "seed", "0", "3"],
        ["recipe", "dpo.beta", str(change().dpo.beta), "0.2"],
    ]
    assert any("3.0 %" in line and "60.0 %" in line for line in out.splitlines())


def test_what_is_not_there_or_not_ones_own_is_refused_in_plain_words(capsys, outputs):
    make_run(outputs, "a")
    assert "no run 'nothing'" in refuse(capsys, "compare", "a", "nothing")
    assert "Did you mean 'evaluation'?" in refuse(capsys, "run-stage", "evalution")
    assert "No such option" in refuse(capsys, "course", "--forse")
    other = ["--recipe", "qwen2.5-0.5b", "--run-dir", "outputs/a"]
    assert "belongs to recipe 'tiny-cpu'" in refuse(capsys, "run-stage", "data", *other)


def refuse(capsys, *arguments):
    status, _, err = call(capsys, *arguments)
    assert status == 2
    return err
