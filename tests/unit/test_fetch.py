"""Fetching real text: checked, whole or not at all, from the network or from a disk."""

from hashlib import sha256

import pytest

from hallulib import cli
from hallulib.data import fetch
from hallulib.data.fetch import SETS, fetch_data
from hallulib.errors import DataError

pytestmark = pytest.mark.unit
FILES = {"notes.csv": b"ID,text\r\n1,a\n", "LICENSE.txt": "CC BY 4.0 \u201cx\u201d".encode()}


@pytest.fixture
def external(tmp_path, monkeypatch):
    """A small data set "tiny", whose official repository is a folder; data/external is empty."""
    there = tmp_path / "official" / "Main Data"
    there.mkdir(parents=True)
    for name, data in FILES.items():
        (there / name).write_bytes(data)
    known = {n: (f"Main Data/{n}", sha256(data).hexdigest()) for n, data in FILES.items()}
    monkeypatch.setitem(SETS, "tiny", {"address": there.parent.as_uri() + "/", "files": known})
    monkeypatch.setattr(fetch, "resolve_path", lambda path: tmp_path / path)
    return tmp_path / "data" / "external" / "tiny"


def read_all(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("source", ["", "official", "official/Main Data"])
def test_the_files_and_the_licence_are_laid_byte_for_byte(external, source):
    lines = fetch_data("tiny", str(external.parents[2] / source) if source else "")
    assert read_all(external) == FILES
    assert [line.rsplit(": ")[-1] for line in lines] == ["written", "written"]


def test_what_is_there_and_right_is_kept_and_what_is_wrong_is_replaced(external):
    fetch_data("tiny")
    before = (external / "LICENSE.txt").stat()
    (external / "notes.csv").write_bytes(b"torn")
    lines = fetch_data("tiny")
    assert [line.rsplit(": ")[-1] for line in lines] == ["written", "kept"]
    assert read_all(external) == FILES
    assert (external / "LICENSE.txt").stat() == before


def test_a_wrong_checksum_is_refused_by_file_and_nothing_is_left_behind(external):
    (external.parents[2] / "official" / "Main Data" / "LICENSE.txt").write_bytes(b"other")
    with pytest.raises(DataError, match=r"LICENSE.txt has another checksum .*\nNext: .*file://"):
        fetch_data("tiny")
    assert not external.exists()


def test_without_a_network_one_plain_error_names_the_other_way(external, monkeypatch, capsys):
    monkeypatch.setitem(SETS["tiny"], "address", "http://127.0.0.1:9/")
    with pytest.raises(SystemExit) as ended:
        cli.main(["fetch", "tiny"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in error
    assert "notes.csv cannot be fetched" in error and "--from FOLDER" in error
    assert not external.exists()


def test_a_copy_that_lacks_a_file_and_an_unknown_set_are_named(external, tmp_path):
    with pytest.raises(DataError, match="no file notes.csv"):
        fetch_data("tiny", str(tmp_path))
    with pytest.raises(DataError, match="'mimic'.*\n.*mts-dialog"):
        fetch_data("mimic")


def test_every_known_file_is_pinned_to_a_commit_and_a_checksum():
    for known in SETS.values():
        assert len(known["address"].rstrip("/").rsplit("/")[-1]) == 40
        assert all(len(checksum) == 64 for _, checksum in known["files"].values())
        assert "LICENSE.txt" in known["files"]
