"""Where things are, how paths are shown, hashes of files and folders, untearable writes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hallulib.errors import StorageError, storage_guard


@cache
def project_root() -> Path:
    """The folder that holds pyproject.toml: above the package, else above the working directory."""
    for start in (Path(__file__).resolve().parent, Path.cwd().resolve()):
        for folder in (start, *start.parents):
            if (folder / "pyproject.toml").is_file() and (folder / "hallulib").is_dir():
                return folder
    raise StorageError(
        "The project folder (with pyproject.toml, notebooks/ and data/) was not found.",
        "Install the package in place (pip install -e .) or start from the project folder.",
    )


def resolve_path(path: str | Path) -> Path:
    """An absolute path as it is; a relative one counts from the project root, wherever we run."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else project_root() / path


def display_path(path: str | Path) -> str:
    """`path` for a reader: relative to the project; outside of it, never with the home directory.

    Notebooks keep their output, so a printed path must not tell whose machine it was.
    """
    path = Path(path)
    absolute = Path(os.path.abspath(path))
    for root, prefix in ((project_root(), ""), (Path.home(), "~/")):
        if absolute.is_relative_to(root):
            return prefix + absolute.relative_to(root).as_posix()
    return absolute.as_posix()


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of one file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: str | Path) -> str:
    """Hex sha256 of a file, or of a folder: every relative name and contents, in sorted order.

    A `checkpoints` folder directly below is left out: it is working state, not a result.
    """
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise FileNotFoundError(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*"), key=lambda p: p.relative_to(path).as_posix()):
        name = file.relative_to(path)
        if file.is_file() and name.parts[0] != "checkpoints":
            digest.update(f"{name.as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hex sha256 of a string (UTF-8)."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the new one, never half of either.

    Raises StorageError when the disk is full or read-only; the old file is then untouched.
    """
    path = Path(path)
    with storage_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON with `write_text_atomic`."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")
