"""The command line: thin, and every error of ours in plain words with status 2."""

import importlib
import json
import subprocess
import sys
import types

import pytest
import yaml
from run_factory import finish

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
    for module in ("hallulib.run", "hallulib.report"):
        monkeypatch.setattr(f"{module}.resolve_path", lambda path: tmp_path / path)
    return tmp_path / "outputs"


def make_run(outputs, name, rate=None, **overrides):
    run = Run.open(outputs / name, load_recipe("tiny-cpu", overrides))
    if rate is not None:
        system = {"n": 300, "hallucination_rate": rate, "interval": [rate - 0.01, rate + 0.01]}
        system |= {"omission_rate": 0.0, "answer_rate": 1.0}
        path = run.path("evaluation/summary.json")
        path.parent.mkdir()
        path.write_text(json.dumps({"systems": {"dpo": system}}))
    return run


def test_help_lists_the_commands(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert all(name in out for name in ("course", "run-stage", "runs", "compare", "recipe"))


def test_a_recipe_is_printed_as_yaml_that_loads_to_the_same_recipe(capsys, tmp_path):
    status, out, _ = call(capsys, "recipe", "tiny-cpu", "--set", "dpo.beta=0.2", "--set", "seed=3")
    path = tmp_path / "copy.yaml"
    path.write_text(out)
    assert status == 0
    assert load_recipe(str(path)) == load_recipe("tiny-cpu", {"dpo.beta": 0.2, "seed": 3})
    assert yaml.safe_load(out)["dpo"]["beta"] == 0.2


def test_an_error_of_ours_is_printed_without_a_traceback_and_ends_with_status_2():
    command = [sys.executable, "-m", "hallulib", "course", "--set", "dpo.betta=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Did you mean 'dpo.beta'?\nNext: " in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_is_a_usage_error(capsys):
    assert call(capsys, "course", "--forse")[0] == 2


def test_the_options_of_course_reach_the_runner(capsys, monkeypatch):
    seen = {}

    def run_course(recipe, run_dir, overrides, **options):
        seen.update(recipe=recipe, run_dir=run_dir, overrides=overrides, **options)

    monkeypatch.setattr("hallulib.course.run_course", run_course)
    call(capsys, *"course --recipe r --run-dir d --set a.b=1 --from 04 --force".split())
    assert seen == {
        "recipe": "r", "run_dir": "d", "overrides": {"a.b": "1"}, "from_notebook": "04",
        "only": "", "force": True,
    }  # fmt: skip


def test_ctrl_c_ends_with_130_and_a_plain_word(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hallulib.course.run_course", interrupted)
    status, _, err = call(capsys, "course")
    assert status == 130
    assert "the same command continues" in err


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_function(stage):
    module, function = STAGES[stage].door.split(":")
    assert callable(getattr(importlib.import_module(f"hallulib.{module}"), function))


def test_a_full_disk_is_printed_in_one_line_with_status_2(capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("hallulib.course.run_course", full)
    status, _, err = call(capsys, "course")
    assert status == 2 and err == "\nError: [Errno 28] No space left on device: 'x'\n"


def test_run_stage_calls_the_stages_function_with_recipe_and_run(capsys, monkeypatch, outputs):
    calls = []
    module = types.SimpleNamespace(prepare_data=lambda recipe, run: calls.append((recipe, run)))
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    assert call(capsys, "run-stage", "data", "--set", "seed=5")[0] == 0
    recipe, run = calls[0]
    assert (recipe.seed, run.root) == (5, outputs / "tiny-cpu")


def test_run_stage_with_force_forgets_the_stage_first(capsys, monkeypatch, outputs):
    recipe = load_recipe("tiny-cpu")
    run = Run.open(outputs / "tiny-cpu", recipe)
    finish(run, recipe, "data")
    current = []
    module = types.SimpleNamespace(prepare_data=lambda _, run: current.append(is_recorded(run)))
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    call(capsys, "run-stage", "data")
    call(capsys, "run-stage", "data", "--force")
    assert current == [True, False]


def is_recorded(run):
    return "data" in run.manifest["stages"]


def test_an_unknown_stage_names_the_nearest(capsys):
    status, _, err = call(capsys, "run-stage", "evalution")
    assert status == 2 and "Did you mean 'evaluation'?" in err


def test_runs_are_listed_with_their_headline_and_a_damaged_one_does_not_hide_the_others(
    capsys, outputs
):
    make_run(outputs, "a", rate=0.03)
    make_run(outputs, "b")
    (make_run(outputs, "c", rate=0.5).root / "evaluation" / "summary.json").write_text("{")
    status, out, _ = call(capsys, "runs")
    found = {block.split("\n")[0]: block for block in out.strip().split("\n\n")}
    assert status == 0
    assert "dpo" in found["a"] and "3.0 %" in found["a"] and "300" in found["a"]
    assert "not evaluated yet" in found["b"]
    assert "unreadable" in found["c"]


def test_without_runs_it_says_so(capsys, outputs):
    assert call(capsys, "runs")[1] == "No runs yet.\n"


def test_two_runs_are_compared_side_by_side(capsys, outputs):
    make_run(outputs, "a", rate=0.03)
    make_run(outputs, "b", rate=0.60, **{"dpo.beta": 0.2})
    status, out, _ = call(capsys, "compare", "a", "b")
    assert status == 0
    assert [line.split() for line in out.splitlines() if "dpo.beta" in line] == [
        ["recipe", "dpo.beta", str(load_recipe("tiny-cpu").dpo.beta), "0.2"]
    ]
    assert any("3.0 %" in line and "60.0 %" in line for line in out.splitlines())
    assert "dpo.sft_weight" not in out


def test_comparing_a_run_that_is_not_there_says_how_to_find_one(capsys, outputs):
    make_run(outputs, "a")
    status, _, err = call(capsys, "compare", "a", "nothing")
    assert status == 2 and "no run 'nothing'" in err


def test_a_run_of_another_recipe_is_refused_in_plain_words(capsys, outputs):
    make_run(outputs, "a")
    status, _, err = call(
        capsys, "run-stage", "data", "--recipe", "qwen2.5-0.5b", "--run-dir", "outputs/a"
    )
    assert status == 2 and "belongs to recipe 'tiny-cpu'" in err
