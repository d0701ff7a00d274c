"""The one row schema that every source ends in, and how rows are read back."""

import json
from pathlib import Path

import pandas as pd

from hallulib.detectors.base import Source
from hallulib.files import sha256_text

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
    """Put the note into the recipe's template; nothing that says what the right answer is."""
    return template.replace("{context}", context)


def hash_context(context: str) -> str:
    """A group id from a note's text: same words, same group, whatever the spacing or case."""
    return "ctx-" + sha256_text(" ".join(context.lower().split()))[:16]


def read_rows(path: Path) -> list[Row]:
    """The rows of one split."""
    return pd.read_parquet(path, columns=list(COLUMNS)).to_dict("records")


def read_facts(row: Row) -> dict | None:
    """The fact table of a row, or None where the source does not know the facts."""
    return json.loads(row["facts"]) if row["facts"] else None


def read_source(row: Row) -> Source:
    """What a summary of this row is judged against."""
    return Source(row["context"], read_facts(row))
