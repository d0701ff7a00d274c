"""Reading CSV, JSON Lines and parquet; errors name the file, the row and the column."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hallulib.data.schema import build_prompt, hash_context, make_row
from hallulib.errors import DataError
from hallulib.paths import display_path

ENDINGS = (".csv", ".jsonl", ".parquet")
csv.field_size_limit(2**31 - 1)  # a note may be longer than csv's default of 131,072 characters


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, record) of a .csv, .jsonl or .parquet file, one at a time.

    Rows count from 1, without the header of a CSV; of a JSONL file the line number is given.
    Raises DataError: no such file, unknown ending, empty, not UTF-8, not JSON, or a ragged row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {display_path(path)}", "check data.path in the recipe")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{display_path(path)} is not a file this course reads",
            f"give a file that ends in one of {', '.join(ENDINGS)}",
        )
    number = 0
    try:
        for number, record in readers[path.suffix.lower()](path):
            yield number, record
    except UnicodeDecodeError as error:
        raise DataError(
            f"{display_path(path)} is not UTF-8, somewhere after row {number}",
            "save the file as UTF-8 (in Excel: CSV UTF-8)",
        ) from error
    if not number:
        raise DataError(f"{display_path(path)} has no rows", "give a file with at least one row")


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # -sig: Excel writes a BOM
        for number, record in enumerate(csv.DictReader(file), start=1):
            if None in record or None in record.values():
                relation = "more" if None in record else "fewer"
                raise DataError(
                    f"{display_path(path)}, row {number}: {relation} fields than the header",
                    "put quotes around fields that hold commas or line breaks",
                )
            yield number, record


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{display_path(path)}, line {number}: not JSON ({error.msg})",
                    "write one complete JSON object per line",
                ) from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{display_path(path)}, line {number}: {type(record).__name__}, not an object",
                    'write one JSON object per line, as {"context": ..., "reference": ...}',
                )
            yield number, record


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{display_path(path)} is not a parquet file ({error})", "write the file again"
        ) from error
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for record in batch.to_pylist():
            number += 1
            yield number, record


def require_text(record: dict[str, Any], column: str, path: str | Path, row: int) -> str:
    """The text in a cell, as it is. Raises DataError if it is missing or no text (null, NaN)."""
    if column not in record:
        raise DataError(
            f"{display_path(path)}, row {row}: no column {column!r} "
            f"(there are: {', '.join(map(str, record))})",
            f"rename the column that holds it to {column!r}",
        )
    value = record[column]
    if not isinstance(value, str):
        raise DataError(
            f"{display_path(path)}, row {row}, column {column!r}: {value!r} is not text",
            "fill the cell or remove the row",
        )
    return value


def load_own_rows(
    path: str | Path, template: str
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Rows of the user's own file: columns context + reference, or prompt + reference.

    Optional columns: id, group_id (document or patient; without it, rows with the same note form a
    group). Returns (rows, dropped: reason -> count): blank notes or references are dropped and
    counted; a missing column, null or NaN raises DataError.
    """
    rows: list[dict[str, str]] = []
    dropped = {"blank_context": 0, "blank_reference": 0}
    for number, record in read_records(path):
        column = "prompt" if "prompt" in record and "context" not in record else "context"
        text = require_text(record, column, path, number)
        reference = require_text(record, "reference", path, number)
        if not text.strip() or not reference.strip():
            dropped["blank_reference" if text.strip() else "blank_context"] += 1
            continue
        prompt = text if column == "prompt" else build_prompt(template, text)
        row_id = str(record.get("id") or f"row-{number}")
        group = str(record.get("group_id") or hash_context(text))
        rows.append(make_row(row_id, group, "file", prompt, reference.strip(), text))
    check_unique_ids(rows, path)
    return rows, dropped


def check_unique_ids(rows: Iterable[dict[str, str]], path: str | Path) -> None:
    """Raises DataError naming the first id that occurs twice: results are joined by id."""
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise DataError(
                f"{display_path(path)}: the id {row['id']!r} occurs twice",
                "give every row an id of its own, or leave the id column out",
            )
        seen.add(row["id"])
