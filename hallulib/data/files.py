"""Reading CSV, JSON, JSON Lines and parquet; errors name the file, the row and the column."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from charset_normalizer import from_bytes

from hallulib.errors import DataError
from hallulib.files import display_path

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = [
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
]  # fmt: skip
BATCH = 256  # rows of a parquet file in memory at a time
csv.field_size_limit(2**31 - 1)  # a note may be longer than csv's default of 131,072 characters


def read_records(path: str | Path, encoding: str = "auto") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, record) of a file, one at a time; a .json file is a list and read whole.

    Rows count from 1, without the header of a CSV; of a JSONL file the line number is given.
    encoding "auto" is UTF-8, or what the byte order mark says; another one must be named.
    Raises DataError: no such file, unknown ending, empty, wrong encoding, malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {display_path(path)}", "check data.path in the recipe")
    if path.suffix.lower() not in ENDINGS:
        raise DataError(
            f"{display_path(path)} is not a file this course reads",
            f"give a file that ends in one of {', '.join(ENDINGS)}",
        )
    number = 0
    try:
        for number, record in _choose_reader(path, encoding):
            yield number, record
    except UnicodeError as error:
        raise _explain_encoding(path, number, error) from error
    if not number:
        raise DataError(f"{display_path(path)} has no rows", "give a file with at least one row")


def _choose_reader(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _read_parquet(path)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}
    return readers[ending](path, _find_encoding(path, encoding))


def _find_encoding(path: Path, encoding: str) -> str:
    if encoding != "auto":
        try:
            name = codecs.lookup(encoding).name
            return "utf-8-sig" if name == "utf-8" else name  # Excel writes a mark before the header
        except LookupError:
            raise DataError(
                f"data.encoding is {encoding!r}, which Python does not know",
                "name it as in utf-8, cp1252, latin-1, mac-roman or utf-16",
            ) from None
    with path.open("rb") as file:
        start = file.read(4)
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")


def _explain_encoding(path: Path, row: int, error: UnicodeError) -> DataError:
    """Show how the bytes read in other encodings: which reading is right, only a person can see."""
    if not isinstance(error, UnicodeDecodeError):
        return DataError(f"{display_path(path)}: {error}", "save the file as UTF-8")
    what = f"{display_path(path)}, after row {row}: the bytes are not {error.encoding}"
    guess = from_bytes(error.object).best()
    around = error.object[max(0, error.start - 12) : error.start + 12]
    names = dict.fromkeys(["cp1252", *([guess.encoding] if guess else []), "mac_roman"])
    readings = [f"{around.decode(name, errors='replace')!r} in {name}" for name in names]
    return DataError(
        what,
        "save the file as UTF-8, or set data.encoding to the one in which this place reads "
        f"right: {', '.join(readings)} (Excel on Windows writes cp1252)",
    )


def _read_csv(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with path.open(encoding=encoding, newline="") as file:
        delimiter = _find_delimiter(file.readline())
        file.seek(0)
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            _check_header(path, reader.fieldnames or [])
            for number, record in enumerate(reader, start=1):
                if None in record or None in record.values():
                    relation = "more" if None in record else "fewer"
                    raise DataError(
                        f"{display_path(path)}, row {number}: {relation} fields than the header",
                        "put quotes around fields that hold commas or line breaks",
                    )
                yield number, record
        except csv.Error as error:
            raise DataError(
                f"{display_path(path)}, row {number + 1}: not CSV ({error})",
                "double the quotes inside a field, and close those around it",
            ) from error


def _find_delimiter(header: str) -> str:
    """The sign that the header has most of: a comma, a semicolon or a tab."""
    return max(",;\t", key=header.count)


def _check_header(path: Path, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(
                f"{display_path(path)}: two columns are called {name!r}", "rename one of them"
            )
        seen.add(name)


def _read_jsonl(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_object(path, f"line {number}", line)


def _parse_object(path: Path, place: str, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{display_path(path)}, {place}: not JSON ({error.msg})",
            "write one complete JSON object per line",
        ) from error
    return _check_object(path, place, record)


def _check_object(path: Path, place: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(
            f"{display_path(path)}, {place}: {type(record).__name__}, not an object",
            'write one JSON object per row, as {"context": ..., "reference": ...}',
        )
    return record


def _read_json(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{display_path(path)}, line {error.lineno}: not JSON ({error.msg})",
            "a .json file is one list; with one object per line its name must end in .jsonl",
        ) from error
    if not isinstance(rows, list):
        raise DataError(
            f"{display_path(path)} holds no list", "write a list of objects, or JSON Lines (.jsonl)"
        )
    for number, record in enumerate(rows, start=1):
        yield number, _check_object(path, f"row {number}", record)


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{display_path(path)} is not a parquet file ({error})", "write the file again"
        ) from error
    number = 0
    for batch in file.iter_batches(batch_size=BATCH):
        for record in batch.to_pylist():
            number += 1
            yield number, record


def require_text(record: dict[str, Any], column: str, path: str | Path, row: int) -> str:
    """The text in a cell, as it is. Raises DataError if it is missing or no text (null, NaN)."""
    if column not in record:
        raise DataError(
            f"{display_path(path)}, row {row}: no column {column!r} "
            f"(there are: {', '.join(map(str, record))})",
            f"rename the column that holds it, or set data.columns ({{{column}: its name}})",
        )
    value = record[column]
    problem = find_text_problem(value)
    if problem:
        place = f"{display_path(path)}, row {row}, column {column!r}"
        raise DataError(f"{place}: {problem}", "fill the cell or remove the row")
    return value


def find_text_problem(value: Any) -> str:
    """What keeps a value from being stored as text; "" if nothing does."""
    if not isinstance(value, str):
        return f"{value!r} is not text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "the text holds half a character (a lone surrogate)"
    return ""


def check_text(value: Any, place: str) -> str:
    """`value` if it is text that can be stored. Raises DataError at `place` otherwise."""
    problem = find_text_problem(value)
    if problem:
        raise DataError(f"{place}: {problem}", "fill it or remove the row")
    return value


def check_unique_ids(
    rows: Iterable[dict[str, str]], path: str | Path
) -> Iterator[dict[str, str]]:
    """Pass rows on. Raises DataError at the first id that occurs twice: results join by id."""
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise DataError(
                f"{display_path(path)}: the id {row['id']!r} occurs twice",
                "give every row an id of its own, or leave the id column out",
            )
        seen.add(row["id"])
        yield row
