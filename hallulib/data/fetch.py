"""Real text that the course uses and does not ship: fetched, checked, laid in data/external/.

MTS-Dialog (Ben Abacha et al., EACL 2023): doctor-patient dialogues with a section of the note,
and 400 summaries graded by people. CC BY 4.0; its licence text is laid beside it.
"""

from hashlib import sha256
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import yaml

from hallulib.errors import DataError
from hallulib.files import display_path, replace_file, resolve_path, sha256_file

SETS = yaml.safe_load(files("hallulib.data").joinpath("fetch.yaml").read_text("utf-8"))


def fetch_data(name: str, source: str = "") -> list[str]:
    """Lay a data set in data/external/<name>/; returns one line for each of its files.

    source: a folder with a copy, for a room without a network; its files may have our names or the
    official ones. What is there and right is kept. Nothing is written unless every file has the
    checksum that is known. Raises DataError, naming the file and what to do.
    """
    if name not in SETS:
        raise DataError(f"there is no data set {name!r} to fetch", f"use one of: {', '.join(SETS)}")
    address, folder = SETS[name]["address"], resolve_path("data/external") / name
    found, lines = {}, []
    for file, (official, checksum) in SETS[name]["files"].items():
        path = folder / file
        if path.is_file() and sha256_file(path) == checksum:
            lines.append(f"{display_path(path)}: kept")
            continue
        data = _copy(Path(source), file, official) if source else _download(address, official)
        if sha256(data).hexdigest() != checksum:
            what = f"{file} has another checksum than the known file; nothing was written"
            raise DataError(what, f"take it from the official repository: {address}{official}")
        found[path] = data
        lines.append(f"{display_path(path)}: written")
    for path, data in found.items():
        with replace_file(path) as temporary:
            temporary.write_bytes(data)
    return lines


def _copy(folder: Path, file: str, official: str) -> bytes:
    for path in (folder / file, folder / Path(official).name, folder / official):
        if path.is_file():
            return path.read_bytes()
    what = f"{display_path(folder)} has no file {file}"
    raise DataError(what, f"lay it there, or under its official name {Path(official).name}")


def _download(address: str, official: str) -> bytes:
    try:
        with urlopen(address + quote(official), timeout=60) as answer:
            return answer.read()
    except (OSError, HTTPException) as error:  # no network, a time-out, a broken connection, a 404
        what = f"{official} cannot be fetched from {address}: {error}"
        raise DataError(what, "check the network, or take a copy with --from FOLDER") from error
