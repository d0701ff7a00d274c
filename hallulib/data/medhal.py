"""MedHal's schema: `id, context, statement, label, explanation, inner_id, source, synthetic`.

label True means factual. `explanation` gives the label away, so it is dropped as the row is read.
Source: arXiv 2504.08596 and the data set's card.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from hallulib.data.files import ENDINGS, check_unique_ids, read_records, require_text
from hallulib.data.schema import build_prompt, hash_context, make_row
from hallulib.errors import DataError
from hallulib.paths import display_path, resolve_path

# MedHal's own names: acm = information extraction, sumpubmed = summarisation. The question and
# inference tasks (medmcqa, medqa, mednli) have no note to summarise.
NOTE_SOURCES = ("acm", "sumpubmed", "clinic")
_LABELS = {"true": True, "1": True, "false": False, "0": False}


def load_medhal_rows(
    path: str, template: str, sources: Iterable[str] = NOTE_SOURCES
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Rows of the schema from MedHal: the factual statement is the reference, its context the note.

    path: a local .csv, .jsonl or .parquet file, or a hub id, with `@revision` where one is pinned
    ("GM07/medhal@<commit>"). Returns (rows, dropped: reason -> count). Twins (the factual and the
    non-factual statement of one inner_id) share a context and so a group.
    Raises DataError naming file, row and column.
    """
    wanted = set(sources)
    rows: list[dict[str, str]] = []
    dropped = {"other_task": 0, "no_context": 0, "not_factual": 0, "blank_statement": 0}
    for number, record in read_medhal(path):
        reason = _find_reason_to_drop(record, wanted, path, number)
        if reason:
            dropped[reason] += 1
            continue
        context = read_context(record, path, number)
        statement = require_text(record, "statement", path, number).strip()
        row = make_row(
            require_text(record, "id", path, number), hash_context(context), record["source"],
            build_prompt(template, context), statement, context,
        )  # fmt: skip
        rows.append(row)
    check_unique_ids(rows, path)
    return rows, dropped


def _find_reason_to_drop(
    record: dict[str, Any], wanted: set[str], path: str, number: int
) -> str | None:
    if require_text(record, "source", path, number) not in wanted:
        return "other_task"
    if not read_context(record, path, number):
        return "no_context"
    if not read_label(record, path, number):
        return "not_factual"
    return None if require_text(record, "statement", path, number).strip() else "blank_statement"


def read_medhal(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number, record without `explanation`) from a local file or from the hub."""
    is_file = path.lower().endswith(ENDINGS)
    records = read_records(resolve_path(path)) if is_file else _read_hub(path)
    for number, record in records:
        record.pop("explanation", None)
        yield number, record


def _read_hub(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import load_dataset

    name, _, revision = path.partition("@")
    try:
        # Arrow on disk: a million rows cost no memory. All splits: the group decides ours.
        splits = load_dataset(name, revision=revision or None)
    except Exception as error:  # datasets raises many kinds: offline, unknown, gated, malformed
        raise DataError(
            f"the data set {name!r} could not be loaded ({type(error).__name__}: {error})",
            "check the name and the network, or give a local .parquet, .csv or .jsonl file "
            "as data.path",
        ) from error
    number = 0
    for split in splits.values():
        for record in split:
            number += 1
            yield number, dict(record)


def read_context(record: dict[str, Any], path: str, row: int) -> str:
    """The note of a MedHal record; None, 'None' and '' alike mean that there is none ("")."""
    if record.get("context") is None and "context" in record:
        return ""
    context = require_text(record, "context", path, row).strip()
    return "" if context == "None" else context


def read_label(record: dict[str, Any], path: str, row: int) -> bool:
    """True = factual. A CSV writes the label as text, so 'True', 'false', '1' and '0' are read."""
    value = record.get("label")
    if isinstance(value, bool):
        return value
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise DataError(
            f"{display_path(path)}, row {row}, column 'label': {value!r} is neither true nor false",
            "label is True for a factual statement and False otherwise",
        )
    return label
