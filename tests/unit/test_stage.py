"""What a stage's wrapper promises: reuse, required inputs, a record only at the very end."""

from dataclasses import dataclass, field

import pytest
from run_factory import finish, write_outputs

from hallulib.errors import HallulibError, MissingArtifact
from hallulib.recipe import load_recipe
from hallulib.run import Run, stage

pytestmark = pytest.mark.unit


@dataclass
class Result:
    source: str
    notes: dict = field(default_factory=dict)


@pytest.fixture
def recipe():
    return load_recipe("tiny-cpu")


@pytest.fixture
def run(tmp_path, recipe):
    return Run.open(tmp_path / "run", recipe)


def make_stage(name, calls, text="x"):
    @stage(name, load=lambda run: Result("loaded"))
    def body(recipe, run):
        """Do it."""
        calls.append(name)
        write_outputs(run, name, text)
        return Result("made", {"rows": 3})

    return body


def test_a_second_call_reuses_and_says_so_in_one_line(run, recipe, capsys):
    calls = []
    prepare = make_stage("data", calls)
    assert prepare(recipe, run).source == "made"
    assert prepare(recipe, run).source == "loaded"
    assert calls == ["data"]
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("data: unchanged, reusing data/train.parquet")
    assert "\n" not in printed


def test_a_changed_setting_runs_the_body_again(run, recipe):
    calls = []
    prepare = make_stage("data", calls)
    prepare(recipe, run)
    prepare(load_recipe("tiny-cpu", {"data.train_size": 10}), run)
    assert calls == ["data", "data"]


def test_a_damaged_output_runs_the_body_again_and_is_mended(run, recipe):
    calls = []
    prepare = make_stage("data", calls)
    prepare(recipe, run)
    run.path("data/test.parquet").write_text("damaged")
    prepare(recipe, run)
    run.require("data/test.parquet")
    assert len(calls) == 2


def test_a_missing_input_stops_the_stage_before_its_body(run, recipe):
    calls = []
    with pytest.raises(MissingArtifact, match="01_data_prep"):
        make_stage("sft", calls)(recipe, run)
    assert calls == []


def test_a_changed_input_stops_the_stage_before_its_body(run, recipe):
    finish(run, recipe, "data")
    run.path("data/train.parquet").write_text("edited")
    calls = []
    with pytest.raises(MissingArtifact, match="01_data_prep"):
        make_stage("sft", calls)(recipe, run)
    assert calls == []


def test_a_body_that_raises_leaves_no_record_but_what_it_wrote(run, recipe):
    @stage("data", load=lambda run: None)
    def body(recipe, run):
        write_outputs(run, "data")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        body(recipe, run)
    assert run.manifest["stages"] == {}
    assert run.path("data/train.parquet").exists()


def test_an_interrupted_body_leaves_no_record(run, recipe):
    @stage("data", load=lambda run: None)
    def body(recipe, run):
        write_outputs(run, "data")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body(recipe, run)
    assert not run.is_current("data", recipe)


def test_a_full_disk_inside_a_body_is_named_as_such(run, recipe):
    @stage("data", load=lambda run: None)
    def body(recipe, run):
        with open("/dev/full", "w") as full:
            full.write("x")

    with pytest.raises(HallulibError, match="full"):
        body(recipe, run)


def test_time_memory_device_and_notes_are_recorded(run, recipe):
    make_stage("data", [])(recipe, run)
    record = run.manifest["stages"]["data"]
    assert record["notes"] == {"rows": 3}
    assert record["device"] == "cpu"
    assert record["peak_memory_bytes"] > 1_000_000
    assert 0 <= record["wall_seconds"] < 60


def test_the_key_is_that_of_the_start_so_that_code_edited_meanwhile_is_noticed(
    run, recipe, tmp_path, monkeypatch
):
    package = tmp_path / "package" / "data"
    package.mkdir(parents=True)
    (package / "prepare.py").write_text("a = 1")
    monkeypatch.setattr("hallulib.stages.PACKAGE", package.parent)

    @stage("data", load=lambda run: None)
    def body(recipe, run):
        write_outputs(run, "data")
        (package / "prepare.py").write_text("a = 2")

    body(recipe, run)
    assert not run.is_current("data", recipe)


def test_a_stage_keeps_its_name_and_docstring():
    body = make_stage("data", [])
    assert (body.__name__, body.__doc__) == ("body", "Do it.")
