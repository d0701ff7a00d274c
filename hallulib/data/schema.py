"""The one row schema that every source ends in, and how rows are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from hallulib.detectors.base import Source
from hallulib.errors import DataError
from hallulib.files import display_path

Row = dict[str, str]
SPLITS = ("train", "validation", "test")
# style_group is "seen", "held_out" or "" (unknown); facts is JSON, "" where they are not known;
# rejected is a worse completion that came with the row (a non-factual twin), "" where none did
COLUMNS = (
    "id", "group_id", "source", "prompt", "reference", "split", "context", "style", "style_group",
    "facts", "rejected",
)  # fmt: skip


def make_row(**known: str) -> Row:
    """Return a row of the schema; columns that are not known are ""."""
    return dict.fromkeys(COLUMNS, "") | known


def build_prompt(template: str, context: str) -> str:
    """Put the note into the recipe's prompt template. Raises DataError without `{context}` in it.

    Only the note goes in: nothing that says what the right answer is.
    """
    if "{context}" not in template:
        raise DataError(
            f"the prompt template {template!r} has no place for the note",
            "write {context} into data.prompt_template of the recipe",
        )
    return template.replace("{context}", context)


def hash_context(context: str) -> str:
    """A group id from a note's text: same words, same group, whatever the spacing or case."""
    normal = " ".join(context.lower().split())
    return "ctx-" + hashlib.sha256(normal.encode()).hexdigest()[:16]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=list(COLUMNS)).to_parquet(path, index=False)


def read_rows(path: Path) -> list[Row]:
    """Read the rows of one split. Raises DataError if a column of the schema is missing."""
    frame = pd.read_parquet(path)
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise DataError(
            f"{display_path(path)} lacks the column {missing[0]!r} of the row schema",
            "run notebook 01_data_prep again",
        )
    return frame[list(COLUMNS)].to_dict("records")


def read_facts(row: Row) -> dict | None:
    """The fact table of a row, or None where the source does not know the facts."""
    return json.loads(row["facts"]) if row["facts"] else None


def read_source(row: Row) -> Source:
    """What a summary of this row is judged against."""
    return Source(row["context"], read_facts(row))
