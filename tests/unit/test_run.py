"""The run folder: its manifest, its chain of hashes, and what happens when the disk says no."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from run_factory import finish, write_outputs

from hallulib import files
from hallulib.errors import HallulibError, MissingArtifact, RecipeError
from hallulib.files import display_path, project_root, sha256_tree, storage_guard, write_text_atomic
from hallulib.recipe import load_recipe
from hallulib.report import compare_runs, find_run, list_runs
from hallulib.run import Run
from hallulib.stages import STAGES, find_code, find_producer

pytestmark = pytest.mark.unit


@pytest.fixture
def recipe():
    return load_recipe("tiny-cpu")


@pytest.fixture
def run(tmp_path, recipe):
    return Run.open(tmp_path / "run", recipe)


def change(name="tiny-cpu", **overrides):
    return load_recipe(name, {key.replace("__", "."): value for key, value in overrides.items()})


# --- the stages as declared ---


def test_every_input_is_an_output_of_an_earlier_stage():
    order = list(STAGES)
    for stage, spec in STAGES.items():
        for artifact in spec.inputs:
            assert order.index(find_producer(artifact)[0]) < order.index(stage), (stage, artifact)


def test_no_two_stages_write_the_same_artifact():
    outputs = [output for spec in STAGES.values() for output in spec.outputs]
    assert len(outputs) == len(set(outputs))


def test_every_stage_names_sections_of_a_recipe(recipe):
    assert {s for spec in STAGES.values() for s in spec.sections} <= set(recipe.to_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_a_stage_names_is_there(stage):
    assert [name for name in STAGES[stage].code if not find_code([name])] == []


# --- opening ---


def test_an_empty_run_dir_means_the_recipes_folder_in_outputs(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("hallulib.run.resolve_path", lambda path: tmp_path / path)
    assert Run.open("", recipe).root == tmp_path / "outputs" / "tiny-cpu"


def test_opening_again_keeps_what_is_recorded(run, recipe):
    finish(run, recipe, "data")
    assert "data" in Run.open(run.root, recipe).manifest["stages"]


def test_a_folder_of_another_recipe_is_refused_and_left_alone(run):
    before = (run.root / "manifest.json").read_text()
    with pytest.raises(HallulibError, match="belongs to recipe 'tiny-cpu'"):
        Run.open(run.root, load_recipe("qwen2.5-0.5b"))
    assert (run.root / "manifest.json").read_text() == before


def test_the_same_recipe_with_other_settings_may_use_the_folder(run):
    Run.open(run.root, change(dpo__beta=0.2))


# --- require ---


def test_what_nobody_has_made_names_the_notebook_and_the_path(run):
    with pytest.raises(MissingArtifact) as caught:
        run.require("sft/adapter")
    assert "02_sft" in caught.value.next_step
    assert "run/sft/adapter" in caught.value.what


def test_a_file_without_a_record_counts_as_unfinished(run):
    write_outputs(run, "data")
    with pytest.raises(MissingArtifact, match="01_data_prep"):
        run.require("data/train.parquet")


def test_a_recorded_artifact_that_was_deleted_is_missing(run, recipe):
    finish(run, recipe, "data")
    run.path("data/test.parquet").unlink()
    with pytest.raises(MissingArtifact):
        run.require("data/test.parquet")


def test_a_finished_artifact_is_found_also_inside_an_output_folder(run, recipe):
    finish(run, recipe, "data", "sft")
    assert run.require("sft/adapter") == run.root / "sft" / "adapter"
    assert run.require("sft/adapter/weights.bin").is_file()


def test_a_changed_artifact_is_refused_naming_the_notebook_that_makes_it(run, recipe):
    finish(run, recipe, "data", "sft")
    (run.path("sft/adapter") / "weights.bin").write_text("edited")
    with pytest.raises(MissingArtifact) as caught:
        run.require("sft/adapter")
    assert "02_sft" in caught.value.next_step


def test_a_file_added_to_an_adapter_makes_it_stale(run, recipe):
    finish(run, recipe, "data", "sft")
    (run.path("sft/adapter") / "more.bin").write_text("")
    with pytest.raises(MissingArtifact):
        run.require("sft/adapter")


def test_an_artifact_is_stale_when_its_producers_input_was_made_anew(run, recipe):
    finish(run, recipe, "data", "sft")
    finish(run, recipe, "data", text="other notes")
    with pytest.raises(MissingArtifact) as caught:
        run.require("sft/adapter")
    assert "data/train.parquet" in caught.value.what
    assert "02_sft" in caught.value.next_step


def test_staleness_is_seen_two_stages_up_and_names_the_first_to_run(run, recipe):
    finish(run, recipe, "data", "sft", "pairs")
    finish(run, recipe, "data", text="other notes")
    with pytest.raises(MissingArtifact) as caught:
        run.require("pairs/candidates.jsonl")
    assert "02_sft" in caught.value.next_step


def test_making_an_input_anew_with_the_same_content_changes_nothing(run, recipe):
    finish(run, recipe, "data", "sft")
    finish(run, recipe, "data")
    run.require("sft/adapter")


# --- keys ---


def test_a_finished_stage_is_current_and_an_unfinished_one_is_not(run, recipe):
    assert not run.is_current("data", recipe)
    finish(run, recipe, "data")
    assert run.is_current("data", recipe)


def test_a_setting_of_its_own_section_makes_a_stage_stale_and_another_does_not(run, recipe):
    finish(run, recipe, "data", "sft")
    assert not run.is_current("sft", change(sft__learning_rate=1e-3))
    assert run.is_current("sft", change(dpo__beta=0.3))


def test_the_seed_makes_every_stage_stale(run, recipe):
    finish(run, recipe, *STAGES)
    assert all(run.is_current(stage, recipe) for stage in STAGES)
    assert not any(run.is_current(stage, change(seed=1)) for stage in STAGES)


def test_a_damaged_output_makes_a_stage_stale(run, recipe):
    finish(run, recipe, "data")
    run.path("data/audit.json").write_text("{}")
    assert not run.is_current("data", recipe)


def test_a_changed_source_file_makes_a_stage_stale(run, recipe, tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "sft.py").write_text("a = 1")
    monkeypatch.setattr("hallulib.stages.PACKAGE", package)
    finish(run, recipe, "data", "sft")
    assert run.is_current("sft", recipe)
    (package / "sft.py").write_text("a = 2")
    assert not run.is_current("sft", recipe)


def test_a_rebuilt_base_model_makes_the_stages_that_load_it_stale(run, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "SHA256SUMS.json").write_text('{"model": "a"}')
    recipe = change(model__name_or_path=str(base))
    finish(run, recipe, *STAGES)
    (base / "SHA256SUMS.json").write_text('{"model": "b"}')
    current = {stage for stage in STAGES if run.is_current(stage, recipe)}
    assert current == {"assessment"}


def test_checkpoints_of_another_setting_are_another_folder_inside_the_stages_own(run, recipe):
    finish(run, recipe, "data")
    mine = run.checkpoint_dir("sft", recipe)
    assert mine.parent == run.root / "sft" / "checkpoints"
    assert mine.name.startswith("sft-") and len(mine.name) == len("sft-") + 12
    assert mine != run.checkpoint_dir("sft", change(sft__max_steps=3))
    assert mine == run.checkpoint_dir("sft", change(dpo__beta=0.3))


def test_forgetting_drops_record_and_checkpoints_and_keeps_the_outputs(run, recipe):
    finish(run, recipe, "data", "sft", "pairs")
    checkpoint = run.checkpoint_dir("sft", recipe)
    checkpoint.mkdir(parents=True)
    run.forget("sft")
    assert not checkpoint.exists()
    assert (run.path("sft/adapter") / "weights.bin").is_file()
    assert "sft" not in run.manifest["stages"]
    with pytest.raises(MissingArtifact, match="02_sft"):
        run.require("pairs/train.parquet")


# --- the manifest ---


def test_a_record_tells_what_made_the_stage(run, recipe):
    finish(run, recipe, "data", "sft")
    record = run.manifest["stages"]["sft"]
    assert set(record) >= {"key", "inputs", "outputs", "recipe", "versions", "finished_at", "notes"}
    data = run.manifest["stages"]["data"]["outputs"]
    assert record["inputs"]["data/train.parquet"] == data["data/train.parquet"]
    assert record["outputs"]["sft/adapter"] == sha256_tree(run.path("sft/adapter"))
    assert "python" in record["versions"]


def test_a_stage_that_left_an_output_out_is_not_recorded(run, recipe):
    write_outputs(run, "data")
    run.path("data/audit.json").unlink()
    with pytest.raises(MissingArtifact, match="audit.json"):
        run.record("data", recipe, {}, {})
    assert run.manifest["stages"] == {}


def test_no_path_of_the_machine_is_written_into_the_manifest(run, recipe):
    finish(run, recipe, "data", "sft")
    text = (run.root / "manifest.json").read_text()
    assert str(run.root) not in text and os.path.expanduser("~") + "/" not in text


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 1}', '{"schema": 99}', "\x00\x00"])
def test_a_corrupted_manifest_is_an_error_and_nothing_is_overwritten(run, recipe, damage):
    finish(run, recipe, "data")
    (run.root / "manifest.json").write_text(damage)
    with pytest.raises(HallulibError, match="manifest.json cannot be read"):
        Run.open(run.root, recipe)
    assert (run.root / "manifest.json").read_text() == damage
    assert run.path("data/train.parquet").exists()


def test_a_record_keeps_the_settings_its_stage_ran_with_and_the_run_claims_no_others(run, recipe):
    finish(run, recipe, "data", "sft")
    other = change(sft__learning_rate=0.9, dpo__beta=0.7)
    finish(run, other, "dpo")
    stages = run.manifest["stages"]
    assert stages["sft"]["recipe"]["sft"] == recipe.to_dict()["sft"]
    assert stages["dpo"]["recipe"]["dpo"]["beta"] == run.manifest["recipe"]["dpo"]["beta"] == 0.7
    assert run.manifest["recipe"]["sft"] == recipe.to_dict()["sft"]


def test_a_second_writer_is_told_who_works_there_and_a_reader_is_not_hindered(run, recipe):
    finish(run, recipe, "data")
    hold = f"""
import pathlib, time
from hallulib.run import Run
run = Run(pathlib.Path({str(run.root)!r}))
with run.lock("stage 'dpo'"):
    pathlib.Path(run.root, "held").touch()
    time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", hold])
    try:
        while not (run.root / "held").exists():
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(HallulibError, match=f"stage 'dpo' .process {process.pid}"):
            run.forget("data")
        assert run.require("data/train.parquet").is_file()
    finally:
        process.kill()
        process.wait()
    run.forget("data")  # a killed process holds nothing


def test_a_run_dir_that_is_a_file_is_one_plain_error(tmp_path, recipe):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match="is a file"):
        Run.open(tmp_path / "file", recipe)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_writers_do_not_lose_each_others_records(run, recipe):
    other = Run.open(run.root, recipe)
    finish(run, recipe, "data")
    other.update(lambda manifest: manifest["notebooks"].update(x={}))
    assert "data" in run.manifest["stages"] and "x" in run.manifest["notebooks"]


# --- lists and comparisons ---


def test_runs_are_listed_by_name_and_other_folders_are_not_runs(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr("hallulib.report.resolve_path", lambda path: tmp_path)
    for name in ("b", "a"):
        Run.open(tmp_path / name, recipe)
    (tmp_path / "gallery").mkdir()
    assert [path.name for path in list_runs()] == ["a", "b"]


def test_comparing_names_the_keys_that_differ_and_their_values(tmp_path):
    Run.open(tmp_path / "a", change())
    Run.open(tmp_path / "b", change(dpo__beta=0.2, seed=3))
    found = compare_runs(tmp_path / "a", tmp_path / "b").filter(like="recipe", axis=0)
    expected = {"recipe seed": (0, 3), "recipe dpo.beta": (change().dpo.beta, 0.2)}
    assert dict(zip(found.index, found.itertuples(index=False, name=None), strict=True)) == expected


def test_a_run_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(MissingArtifact, match="no run"):
        find_run(tmp_path / "nothing")


# --- paths ---


def test_a_path_is_shown_relative_to_the_project_and_never_with_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert display_path(project_root() / "outputs" / "x") == "outputs/x"
    assert display_path(tmp_path / "runs" / "x") == "~/runs/x"


def test_the_hash_of_a_folder_sees_names_and_contents_but_not_times(tmp_path):
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    first = sha256_tree(tmp_path)
    os.utime(tmp_path / "a", (0, 0))
    assert sha256_tree(tmp_path) == first
    os.rename(tmp_path / "b", tmp_path / "c")
    assert sha256_tree(tmp_path) != first


def test_what_is_work_or_rubbish_is_no_content(tmp_path):
    (tmp_path / "weights").write_text("1")
    first = sha256_tree(tmp_path)
    for name in (".DS_Store", ".weights.x1", "half.tmp", "checkpoints/a", ".cache/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("2")
    assert sha256_tree(tmp_path) == first


def test_a_large_file_with_the_same_size_and_time_is_seen_to_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 0)
    path = tmp_path / "weights"
    path.write_text("1")
    first, times = sha256_tree(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    time.sleep(0.02)
    path.write_text("2")
    os.utime(path, ns=times)
    assert sha256_tree(path) != first


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text_atomic(path, "old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(HallulibError, match="full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


# --- real disks that say no ---


@contextmanager
def small_disk(folder, options):
    """Mount a tmpfs of 200 kB on `folder`; skips the test where that is not permitted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size=200k,{options}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_that_keeps_every_record(tmp_path, recipe):
    with small_disk(tmp_path / "disk", "rw") as disk:
        run = Run.open(disk / "run", recipe)
        finish(run, recipe, "data")
        with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        with pytest.raises(HallulibError, match="full"):
            run.update(lambda manifest: manifest["notebooks"].update(x="y" * 8192))
        assert run.is_current("data", recipe)


def test_a_read_only_disk_is_an_error_that_says_so(tmp_path, recipe):
    with small_disk(tmp_path / "disk", "ro") as disk:
        with pytest.raises(HallulibError, match="read-only") as caught:
            Run.open(disk / "run", recipe)
    assert "run_dir" in caught.value.next_step


def test_the_kernels_word_for_a_full_disk_is_understood():
    with pytest.raises(HallulibError, match="full"), storage_guard("x"):
        with open("/dev/full", "w") as full:
            full.write("x")


def test_a_full_disk_reported_by_a_rust_library_is_understood():
    with pytest.raises(HallulibError, match="full"), storage_guard("x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_understood(tmp_path):
    """torch.save raises a RuntimeError without any error number."""
    torch = pytest.importorskip("torch")
    with small_disk(tmp_path / "disk", "rw") as disk:
        with pytest.raises(HallulibError, match="disk full"), storage_guard(disk):
            torch.save(torch.zeros(400, 400), disk / "optimizer.pt")


def test_other_errors_pass_a_storage_guard_unchanged():
    with pytest.raises(FileNotFoundError), storage_guard("x"):
        raise FileNotFoundError("x")
