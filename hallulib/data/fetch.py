"""Real text that the course uses and does not ship: fetched, checked, laid in data/external/.

MTS-Dialog (Ben Abacha et al., EACL 2023): doctor-patient dialogues with a section of the note,
and 400 summaries graded by people. CC BY 4.0; its licence text is laid beside it.
"""

from __future__ import annotations

from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

from hallulib.errors import DataError
from hallulib.files import display_path, replace_file, resolve_path, sha256_file

_COMMIT = "3ff0801933608d6f570468c13125125fb5cabdea"
_MTS = f"https://raw.githubusercontent.com/abachaa/MTS-Dialog/{_COMMIT}/"
# data set -> address, and per file: its name here, its path there, its sha256
SETS: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "mts-dialog": (_MTS, [
        ("training.csv", "Main-Dataset/MTS-Dialog-TrainingSet.csv",
         "65a28681dd59fc159681ea026e44610f2af7bc64a0e7f892d763eb03d9f503dc"),
        ("validation.csv", "Main-Dataset/MTS-Dialog-ValidationSet.csv",
         "227206520c4534381c0d7fba6d3f09319a9af5a6d9603a93c0341af1198e3958"),
        ("test_1.csv", "Main-Dataset/MTS-Dialog-TestSet-1-MEDIQA-Chat-2023.csv",
         "b4d38dd2c99b2e9860099abcf653f1e0f3e9b69f9fcc45be2a2699b37a4d2f37"),
        ("automatic_summaries.csv",
         "Correlation-Study/MTS-Dialog-Automatic-Summaries-ValidationSet.csv",
         "0ee4261f33f7001643cfb88779bf2af49a6e1829e70460bb9b67917d48276f2d"),
        ("manual_scores.csv", "Correlation-Study/MTS-Dialog-Manual-Scores4CorrelationStudy.csv",
         "48344ac1ea8a8c8dc6286cebc59b734bbe29d821e32bd3cfefb4c72f0b70088d"),
        ("LICENSE.txt", "LICENSE.txt",
         "5b63c5abb5f4218f79230730b3733ce681383e2d656044069b8c73cbdb8e7fb7"),
    ]),
}  # fmt: skip


def fetch_data(name: str, source: str = "") -> list[str]:
    """Lay a data set in data/external/<name>/; returns one line for each of its files.

    source: a folder with a copy, for a room without a network; its files may have our names or the
    official ones. What is there and right is kept. Nothing is written unless every file has the
    checksum that is known here. Raises DataError, naming the file and what to do.
    """
    if name not in SETS:
        raise DataError(f"there is no data set {name!r} to fetch", f"use one of: {', '.join(SETS)}")
    address, files = SETS[name]
    folder = resolve_path("data/external") / name
    found, lines = {}, []
    for file, official, checksum in files:
        if (folder / file).is_file() and sha256_file(folder / file) == checksum:
            lines.append(f"{display_path(folder / file)}: kept")
            continue
        data = _copy(Path(source), file, official) if source else _download(address, official)
        if sha256(data).hexdigest() != checksum:
            raise DataError(
                f"{file} is not the file that is known: its checksum differs; nothing was written",
                f"take it from the official repository: {address}{official}",
            )
        found[folder / file] = data
        lines.append(f"{display_path(folder / file)}: written")
    for path, data in found.items():
        with replace_file(path) as temporary:
            temporary.write_bytes(data)
    return lines


def _copy(folder: Path, file: str, official: str) -> bytes:
    for path in (folder / file, folder / Path(official).name, folder / official):
        if path.is_file():
            return path.read_bytes()
    raise DataError(
        f"{display_path(folder)} has no file {file}",
        f"lay it there, or under its official name {Path(official).name}",
    )


def _download(address: str, official: str) -> bytes:
    try:
        with urlopen(address + quote(official), timeout=60) as answer:
            return answer.read()
    except (OSError, HTTPException) as error:  # no network, a time-out, a broken connection, a 404
        raise DataError(
            f"{official} cannot be fetched from {address}: {error}",
            "check the network, or take a copy from a disk with --from FOLDER",
        ) from error
