"""Where things are and how they are shown; hashes, untearable writes, JSON Lines, a full disk."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from hallulib.errors import DataError, HallulibError

LARGE = 2**26  # bytes; smaller files take no time to hash


def project_root() -> Path:
    """The folder that holds hallulib/, notebooks/ and data/ (the package is installed in place)."""
    return Path(__file__).resolve().parents[1]


def resolve_path(path: str | Path) -> Path:
    """An absolute path as it is; a relative one counts from the project root, wherever we run."""
    return project_root() / Path(path).expanduser()


def display_path(path: str | Path) -> str:
    """`path` for a reader: relative to the project, or to the home as ~, since notebooks keep what
    they print and must not tell whose machine it was."""
    path = Path(os.path.abspath(path))
    for root, prefix in ((project_root(), ""), (Path.home(), "~/")):
        if path.is_relative_to(root):
            return prefix + path.relative_to(root).as_posix()
    return path.as_posix()


def sha256_text(text: str) -> str:
    """Hex sha256 of a string (UTF-8)."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of one file's contents; a large file is read once while nothing touches it."""
    stat = os.stat(path)
    stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    hash_once = _hash_file if stat.st_size >= LARGE else _hash_file.__wrapped__
    return hash_once(str(path), stamp)


@cache
def _hash_file(path: str, stamp: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: str | Path) -> str:
    """Hex sha256 of a file, or of a folder's names and contents, without hidden and temporary
    files and the working state in `checkpoints`."""
    path = Path(path)
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for name in sorted(file.relative_to(path).as_posix() for file in path.rglob("*")):
        passing = name.endswith(".tmp") or name.startswith("checkpoints/") or "/." in f"/{name}"
        if (path / name).is_file() and not passing:
            digest.update(f"{name}\0{sha256_file(path / name)}\n".encode())
    return digest.hexdigest()


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, which then takes the place of `path`, whole or not at all.
    Raises HallulibError when the disk is full or read-only."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` through `replace_file`."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON through `replace_file`."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines through `replace_file`."""
    with replace_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        append_lines(file, rows)


def append_lines(file: TextIO, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a JSON Lines file and wait until they are on the disk."""
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file. Raises DataError naming the line that is not JSON."""
    advice = f"delete {display_path(path)} and run the notebook that writes it again"
    with path.open(encoding="utf-8") as file:
        return [row for _, row in parse_lines(file, path.name, advice)]


def parse_lines(lines: Iterable[str], name: str, advice: str) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of JSON Lines, blank ones left out. Raises DataError with `advice`
    at the first line of file `name` that is not JSON."""
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{name}, line {number}: not JSON ({error.msg})", advice) from error


def recover_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a work file up to the first line that is torn or damaged; it is cut there."""
    rows, good = [], 0
    data = path.read_bytes() if path.exists() else b""
    for line in data.split(b"\n")[:-1]:  # what follows the last line's end is torn, or empty
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
        good += len(line) + 1
    if good < len(data):
        os.truncate(path, good)
    return rows


_CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "there is no permission for it",
    errno.EPERM: "there is no permission for it",
}


@contextmanager
def storage_guard(path: str | Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk below `path` into one plain error."""
    try:
        yield
    except Exception as error:
        cause = None if isinstance(error, HallulibError) else _storage_cause(error)
        if cause is None:
            raise
        raise HallulibError(
            f"Cannot write to {display_path(path)}: {cause}.",
            "Free some space or choose another folder with run_dir; finished stages are kept "
            "and the same command continues.",
        ) from error


def _storage_cause(error: BaseException | None) -> str | None:
    """What is wrong with the disk, looking through chained exceptions; None if nothing is."""
    while error is not None:
        # Rust libraries (safetensors, tokenizers) tell the number in an exception of their own,
        # and torch.save nothing but where it stopped.
        match = re.search(r"\(os error (\d+)\)", str(error))
        number = int(match[1]) if match else getattr(error, "errno", None)
        if number in _CAUSES:
            return _CAUSES[number]
        if isinstance(error, RuntimeError) and "inline_container" in str(error):
            return "a file could not be written to its end (is the disk full?)"
        error = error.__cause__ or error.__context__
    return None
