"""Reading CSV, JSON, JSON Lines and parquet; errors name the file, the row and the column.

Not with pandas: its readers drop the surplus fields of a CSV row, turn the id "007" into 7, name no
line of a broken JSON file, and make 3.0 of a whole number beside an empty cell.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hallulib.errors import DataError
from hallulib.files import display_path, parse_lines

Record = dict[str, Any]
BATCH = 256  # rows of a parquet file in memory at a time
csv.field_size_limit(2**31 - 1)  # a note may be longer than csv's default of 131,072 characters


def read_records(path: Path, encoding: str = "auto") -> Iterator[tuple[int, Record]]:
    """Yield (row number, record) of a file; of parquet, only a batch of rows is in memory.

    Rows count from 1, without the header of a CSV; of a JSONL file the line number is given.
    encoding "auto" is UTF-8, or what the byte order mark says; another one must be named.
    Raises DataError: no such file, unknown ending, empty, wrong encoding, malformed.
    """
    name, ending, number = display_path(path), path.suffix.lower(), 0
    if not path.is_file():
        raise DataError(f"there is no file {name}", "check data.path in the recipe")
    if ending not in ENDINGS:
        known = ", ".join(ENDINGS)
        raise DataError(f"{name} is not a file this course reads", f"give a file in {known}")
    source = path if ending == ".parquet" else _read_file(path, name, encoding)
    for number, record in READERS[ending](source, name):
        if not isinstance(record, dict):
            what = f"{name}, row {number}: {type(record).__name__}, not an object"
            raise DataError(what, 'write one JSON object per row, as {"context": ...}')
        yield number, record
    if not number:
        raise DataError(f"{name} has no rows", "give a file with at least one row")


def _read_file(path: Path, name: str, encoding: str) -> str:
    """The text of a file; where the bytes are in another encoding, how they read in others, because
    only a person can see which reading is right."""
    data = path.read_bytes()
    if encoding == "auto":
        encoding = json.detect_encoding(data)  # utf-8, or by the mark; of other text, too
    try:
        return data.decode(encoding).removeprefix("\ufeff")  # Excel writes a mark into UTF-8
    except LookupError as error:
        raise DataError(f"data.encoding: {error}", "name one, as utf-8, cp1252, utf-16") from None
    except UnicodeDecodeError as error:
        around = data[max(0, error.start - 12) : error.start + 12]
        others = ("cp1252", "cp1250", "mac_roman", "shift_jis")
        readings = [f"{around.decode(code, errors='replace')!r} in {code}" for code in others]
        raise DataError(
            f"{name}, line {data.count(10, 0, error.start) + 1}: the bytes are not {encoding}",
            "save the file as UTF-8, or set data.encoding to the one in which this place reads "
            f"right: {', '.join(readings)} (Excel on Windows writes cp1252)",
        ) from error


def _read_parquet(path: Path, name: str) -> Iterator[tuple[int, Record]]:
    try:
        file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"{name} is not a parquet file ({error})", "write it again") from error
    batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=BATCH))
    return enumerate(chain.from_iterable(batches), start=1)


def _read_csv(text: str, name: str) -> Iterator[tuple[int, Record]]:
    # the delimiter is the sign that the header has most of
    delimiter, number = max(",;\t", key=text.split("\n", 1)[0].count), 0
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            double = max(columns, key=columns.count)
            raise DataError(f"{name}: two columns are called {double!r}", "rename one of them")
        for number, record in enumerate(reader, start=1):
            if None in record or None in record.values():
                relation = "more" if None in record else "fewer"
                what = f"{name}, row {number}: {relation} fields than the header"
                raise DataError(what, "put quotes around fields that hold commas or line breaks")
            yield number, record
    except csv.Error as error:
        what = f"{name}, row {number + 1}: not CSV ({error})"
        raise DataError(what, "double the quotes inside a field, and close those around") from error


def _read_jsonl(text: str, name: str) -> Iterator[tuple[int, Any]]:
    return parse_lines(io.StringIO(text), name, "write one complete JSON object per line")


def _read_json(text: str, name: str) -> Iterator[tuple[int, Any]]:
    advice = "write one list of objects, or one object per line in a file that ends in .jsonl"
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}, line {error.lineno}: not JSON ({error.msg})", advice) from error
    if not isinstance(rows, list):
        raise DataError(f"{name} holds no list", advice)
    return enumerate(rows, start=1)


READERS = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json,
           ".parquet": _read_parquet}  # fmt: skip
ENDINGS = tuple(READERS)


def read_text(record: Record, column: str, place: str) -> str:
    """The text in a cell, as it is. Raises DataError at `place` (file and row) if it is missing or
    no text (null, NaN)."""
    if column not in record:
        what = f"{place}: no column {column!r} (there are: {', '.join(map(str, record))})"
        raise DataError(what, f"rename a column, or set data.columns ({{{column}: its name}})")
    return check_text(record[column], f"{place}, column {column!r}")


def check_text(value: Any, place: str) -> str:
    """`value`, if it can be stored as text: a lone surrogate, half a character, cannot."""
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise DataError(f"{place}: {value!r:.80} is not text", "fill it or remove the row")
    return value
