"""Files of one JSON object per line: whole ones, and work files that survive an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from hallulib.errors import DataError
from hallulib.paths import display_path, write_text_atomic


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file. Raises DataError naming the line that is not JSON."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path.name}, line {number}: not JSON ({error.msg})",
                    f"delete {display_path(path)} and run the notebook that writes it again",
                ) from error
    return rows


def recover_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a work file up to the first line that is torn or damaged; the file is cut there,
    and what came after is made again."""
    rows, good, data = [], 0, path.read_bytes() if path.exists() else b""
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        rows.append(row)
        good += len(line)
    if good < len(data):
        os.truncate(path, good)
    return rows


def append_lines(file: TextIO, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a work file and wait until they are on the disk."""
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    file.flush()
    os.fsync(file.fileno())
