"""The run folder: its manifest, its chain of hashes, and what a stage's wrapper promises."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from run_factory import change, finish, write_outputs

from hallulib.errors import HallulibError, MissingArtifact
from hallulib.files import sha256_tree
from hallulib.recipe import load_recipe
from hallulib.run import Run, stage
from hallulib.stages import STAGES, find_code, find_producer

pytestmark = pytest.mark.unit


@pytest.fixture
def recipe():
    return load_recipe("tiny-cpu")


@pytest.fixture
def run(tmp_path, recipe):
    return Run.open(tmp_path / "run", recipe)


# --- the stages as declared ---


def test_the_stages_rest_on_earlier_ones_and_name_what_there_is(recipe):
    order, outputs = list(STAGES), [name for spec in STAGES.values() for name in spec.outputs]
    assert len(outputs) == len(set(outputs))
    for name, spec in STAGES.items():
        assert all(order.index(find_producer(i)[0]) < order.index(name) for i in spec.inputs)
        assert set(spec.sections) <= set(recipe.to_dict())
        assert [code for code in spec.code if not find_code([code])] == []


# --- opening ---


def test_a_folder_is_opened_again_with_other_settings_but_not_with_another_recipe(
    run, recipe, tmp_path, monkeypatch
):
    finish(run, recipe, "data")
    assert "data" in Run.open(run.root, change(dpo__beta=0.2)).manifest["stages"]
    before = (run.root / "manifest.json").read_text()
    with pytest.raises(HallulibError, match="belongs to recipe 'tiny-cpu'"):
        Run.open(run.root, load_recipe("qwen2.5-0.5b"))
    assert (run.root / "manifest.json").read_text() == before
    with pytest.raises(OSError, match="exists"):  # the command line prints it in plain words
        Run.open(run.root / "manifest.json", recipe)
    monkeypatch.setattr("hallulib.run.resolve_path", lambda path: tmp_path / path)
    assert Run.open("", recipe).root == tmp_path / "outputs" / "tiny-cpu"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 1}', '{"schema": 99}', "\x00\x00"])
def test_a_corrupted_manifest_is_an_error_and_nothing_is_overwritten(run, recipe, damage):
    finish(run, recipe, "data")
    (run.root / "manifest.json").write_text(damage)
    with pytest.raises(HallulibError, match="manifest.json cannot be read"):
        Run.open(run.root, recipe)
    assert (run.root / "manifest.json").read_text() == damage
    assert run.path("data/train.parquet").exists()


# --- require ---


def refuse(run, artifact, notebook):
    """What `require` says of an artifact that `notebook` has to make (again)."""
    with pytest.raises(MissingArtifact) as caught:
        run.require(artifact)
    assert notebook in caught.value.next_step
    return caught.value.what


def test_only_a_recorded_artifact_that_is_there_is_found(run, recipe):
    assert "run/sft/adapter" in refuse(run, "sft/adapter", "02_sft")
    write_outputs(run, "data")
    refuse(run, "data/train.parquet", "01_data_prep")
    finish(run, recipe, "data", "sft")
    assert run.require("sft/adapter") == run.root / "sft" / "adapter"
    assert run.require("sft/adapter/weights.bin").is_file()
    run.path("data/test.parquet").unlink()
    refuse(run, "data/test.parquet", "01_data_prep")


@pytest.mark.parametrize("name", ["weights.bin", "more.bin"])
def test_an_artifact_that_was_edited_or_added_to_is_refused(run, recipe, name):
    finish(run, recipe, "data", "sft")
    (run.path("sft/adapter") / name).write_text("edited")
    assert "changed after" in refuse(run, "sft/adapter", "02_sft")


@pytest.mark.parametrize("artifact", ["sft/adapter", "pairs/candidates.jsonl"])
def test_an_input_made_anew_makes_stale_what_rests_on_it_and_the_first_to_run_is_named(
    run, recipe, artifact
):
    finish(run, recipe, "data", "sft", "pairs")
    finish(run, recipe, "data")  # with the same content
    run.require(artifact)
    finish(run, recipe, "data", text="other notes")
    assert "data/train.parquet" in refuse(run, artifact, "02_sft")


def test_forgetting_drops_record_and_checkpoints_and_keeps_the_outputs(run, recipe):
    finish(run, recipe, "data", "sft", "pairs")
    checkpoint = run.checkpoint_dir("sft", recipe)
    checkpoint.mkdir(parents=True)
    run.forget("sft")
    assert not checkpoint.exists()
    assert (run.path("sft/adapter") / "weights.bin").is_file()
    assert "sft" not in run.manifest["stages"]
    refuse(run, "pairs/train.parquet", "02_sft")


# --- what decides a stage ---


def list_current(run, recipe):
    return {stage for stage in STAGES if run.is_current(stage, recipe)}


def test_a_setting_of_its_own_section_makes_a_stage_stale_and_the_seed_every_one(run, recipe):
    assert list_current(run, recipe) == set()
    finish(run, recipe, *STAGES)
    assert list_current(run, recipe) == set(STAGES)
    assert not run.is_current("sft", change(sft__learning_rate=1e-3))
    assert run.is_current("sft", change(dpo__beta=0.3))
    assert list_current(run, change(seed=1)) == set()


def test_a_changed_source_file_or_a_damaged_output_makes_a_stage_stale(
    run, recipe, tmp_path, monkeypatch
):
    (tmp_path / "sft.py").write_text("a = 1")
    monkeypatch.setattr("hallulib.stages.PACKAGE", tmp_path)
    finish(run, recipe, "data", "sft")
    assert run.is_current("sft", recipe)
    (tmp_path / "sft.py").write_text("a = 2")
    assert not run.is_current("sft", recipe)
    run.path("data/audit.json").write_text("{}")
    assert not run.is_current("data", recipe)


def test_a_rebuilt_base_model_makes_the_stages_that_load_it_stale(run, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "SHA256SUMS.json").write_text('{"model": "a"}')
    recipe = change(model__name_or_path=str(base))
    finish(run, recipe, *STAGES)
    (base / "SHA256SUMS.json").write_text('{"model": "b"}')
    assert list_current(run, recipe) == {"assessment"}


def test_checkpoints_of_another_setting_are_another_folder_inside_the_stages_own(run, recipe):
    finish(run, recipe, "data")
    mine = run.checkpoint_dir("sft", recipe)
    assert mine.parent == run.root / "sft" / "checkpoints"
    assert mine.name.startswith("sft-") and len(mine.name) == len("sft-") + 12
    assert mine != run.checkpoint_dir("sft", change(sft__max_steps=3))
    assert mine == run.checkpoint_dir("sft", change(dpo__beta=0.3))


# --- what is recorded ---


def test_a_record_tells_what_made_the_stage_and_names_no_path_of_the_machine(run, recipe):
    finish(run, recipe, "data", "sft")
    record = run.manifest["stages"]["sft"]
    assert set(record) >= {"key", "inputs", "outputs", "recipe", "versions", "finished_at"}
    data = run.manifest["stages"]["data"]["outputs"]
    assert record["inputs"]["data/train.parquet"] == data["data/train.parquet"]
    assert record["outputs"]["sft/adapter"] == sha256_tree(run.path("sft/adapter"))
    assert "python" in record["versions"]
    text = (run.root / "manifest.json").read_text()
    assert str(run.root) not in text and os.path.expanduser("~") + "/" not in text


def test_a_stage_that_left_an_output_out_is_not_recorded(run, recipe):
    write_outputs(run, "data")
    run.path("data/audit.json").unlink()
    with pytest.raises(FileNotFoundError, match="audit.json"):
        run.record("data", recipe, {}, {})
    assert run.manifest["stages"] == {}


def test_a_record_keeps_the_settings_its_stage_ran_with_and_the_run_claims_no_others(run, recipe):
    finish(run, recipe, "data", "sft")
    finish(run, change(sft__learning_rate=0.9, dpo__beta=0.7), "dpo")
    stages = run.manifest["stages"]
    assert stages["sft"]["recipe"]["sft"] == recipe.to_dict()["sft"]
    assert stages["dpo"]["recipe"]["dpo"]["beta"] == run.manifest["recipe"]["dpo"]["beta"] == 0.7
    assert run.manifest["recipe"]["sft"] == recipe.to_dict()["sft"]


def test_a_second_writer_is_refused_or_follows_and_a_reader_is_not_hindered(run, recipe):
    finish(run, recipe, "data")
    hold = f"""
import pathlib, time
from hallulib.run import Run
run = Run(pathlib.Path({str(run.root)!r}))
with run.lock():
    pathlib.Path(run.root, "held").touch()
    time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", hold])
    try:
        while not (run.root / "held").exists():
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(HallulibError, match="is being written by another process"):
            run.forget("data")
        assert run.require("data/train.parquet").is_file()
    finally:
        process.kill()
        process.wait()
    finish(run, recipe, "data")  # a killed process holds nothing
    Run(run.root).update(lambda manifest: manifest["notebooks"].update(x={}))
    assert "data" in run.manifest["stages"] and "x" in run.manifest["notebooks"]


# --- a stage's wrapper ---


def make_stage(name, calls, meanwhile=lambda: None):
    @stage(name, load=lambda run: SimpleNamespace(source="loaded"))
    def body(recipe, run):
        """Do it."""
        calls.append(name)
        write_outputs(run, name)
        meanwhile()
        return SimpleNamespace(source="made", notes={"rows": 3})

    return body


def test_a_second_call_reuses_and_says_so_in_one_line(run, recipe, capsys):
    calls = []
    prepare = make_stage("data", calls)
    assert (prepare.__name__, prepare.__doc__) == ("body", "Do it.")
    assert prepare(recipe, run).source == "made"
    assert prepare(recipe, run).source == "loaded"
    assert calls == ["data"]
    record = run.manifest["stages"]["data"]
    assert (record["notes"], record["device"]) == ({"rows": 3}, "cpu")
    assert record["peak_memory_bytes"] > 1_000_000 and 0 <= record["wall_seconds"] < 60
    printed = capsys.readouterr().out.strip()
    assert printed.startswith("data: unchanged, reusing data/train.parquet")
    assert "\n" not in printed


def test_a_changed_setting_or_a_damaged_output_runs_the_body_again(run, recipe):
    calls = []
    prepare = make_stage("data", calls)
    prepare(recipe, run)
    prepare(change(data__train_size=10), run)
    run.path("data/test.parquet").write_text("damaged")
    prepare(change(data__train_size=10), run)
    run.require("data/test.parquet")
    assert calls == ["data"] * 3


def test_a_missing_or_changed_input_stops_the_stage_before_its_body(run, recipe):
    calls = []
    with pytest.raises(MissingArtifact, match="01_data_prep"):
        make_stage("sft", calls)(recipe, run)
    finish(run, recipe, "data")
    run.path("data/train.parquet").write_text("edited")
    with pytest.raises(MissingArtifact, match="01_data_prep"):
        make_stage("sft", calls)(recipe, run)
    assert calls == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_body_that_raises_leaves_no_record_but_what_it_wrote(run, recipe, error):
    def fail():
        raise error("half way")

    with pytest.raises(error, match="half way"):
        make_stage("data", [], fail)(recipe, run)
    assert run.manifest["stages"] == {}
    assert run.path("data/train.parquet").exists()


def test_a_full_disk_inside_a_body_is_named_as_such(run, recipe):
    with pytest.raises(HallulibError, match="full"), open("/dev/full", "wb", buffering=0) as full:
        make_stage("data", [], lambda: full.write(b"x"))(recipe, run)


def test_the_key_is_that_of_the_start_so_that_code_edited_meanwhile_is_noticed(
    run, recipe, tmp_path, monkeypatch
):
    source = tmp_path / "data" / "prepare.py"
    source.parent.mkdir()
    source.write_text("a = 1")
    monkeypatch.setattr("hallulib.stages.PACKAGE", tmp_path)
    make_stage("data", [], lambda: source.write_text("a = 2"))(recipe, run)
    assert not run.is_current("data", recipe)
