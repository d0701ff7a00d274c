"""Paths as shown, hashes, JSON Lines, and what happens when the disk says no."""

import os
import subprocess
import time
from contextlib import contextmanager

import pytest
from run_factory import finish

from hallulib import files
from hallulib.errors import HallulibError
from hallulib.files import display_path, project_root, sha256_tree, storage_guard, write_text_atomic
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit


def test_a_path_is_shown_relative_to_the_project_and_never_with_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert display_path(project_root() / "outputs" / "x") == "outputs/x"
    assert display_path(tmp_path / "runs" / "x") == "~/runs/x"


def test_the_hash_of_a_folder_sees_names_and_contents_but_not_times_or_rubbish(tmp_path):
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    first = sha256_tree(tmp_path)
    os.utime(tmp_path / "a", (0, 0))
    for name in (".DS_Store", ".weights.x1", "half.tmp", "checkpoints/a", ".cache/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("2")
    assert sha256_tree(tmp_path) == first
    os.rename(tmp_path / "b", tmp_path / "c")
    assert sha256_tree(tmp_path) != first


def test_a_large_file_with_the_same_size_and_time_is_seen_to_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", 0)
    path = tmp_path / "weights"
    path.write_text("1")
    first, times = sha256_tree(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    time.sleep(0.02)
    path.write_text("2")
    os.utime(path, ns=times)
    assert sha256_tree(path) != first


def test_a_work_file_is_read_up_to_its_first_damaged_line_and_cut_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert files.recover_lines(path) == []
    for torn in ('{"a": 3', "{damaged}\n" + '{"a": 4}\n'):
        path.write_text('{"a": 1}\n{"a": 2}\n' + torn)
        assert files.recover_lines(path) == files.read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_text_atomic(path, "old")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(HallulibError, match="full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


@contextmanager
def small_disk(folder, options="rw"):
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


def test_a_full_disk_is_an_error_that_keeps_every_record(tmp_path):
    recipe = load_recipe("tiny-cpu")
    with small_disk(tmp_path / "disk") as disk:
        run = Run.open(disk / "run", recipe)
        finish(run, recipe, "data")
        with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        with pytest.raises(HallulibError, match="full"):
            run.update(lambda manifest: manifest["notebooks"].update(x="y" * 8192))
        assert run.is_current("data", recipe)


def test_a_read_only_disk_is_an_error_that_says_so(tmp_path):
    with small_disk(tmp_path / "disk", "ro") as disk:
        with pytest.raises(HallulibError, match="read-only") as caught:
            Run.open(disk / "run", load_recipe("tiny-cpu"))
    assert "run_dir" in caught.value.next_step


def test_a_full_disk_is_understood_also_from_a_rust_library_and_other_errors_pass():
    rust = RuntimeError("I/O error: No space left on device (os error 28)")
    for error in (OSError(28, "No space left"), rust):
        with pytest.raises(HallulibError, match="full"), storage_guard("x"):
            raise error
    with pytest.raises(FileNotFoundError), storage_guard("x"):
        raise FileNotFoundError("x")


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_understood(tmp_path):
    """torch.save raises a RuntimeError without any error number."""
    torch = pytest.importorskip("torch")
    with small_disk(tmp_path / "disk") as disk:
        with pytest.raises(HallulibError, match="disk full"), storage_guard(disk):
            torch.save(torch.zeros(400, 400), disk / "optimizer.pt")
