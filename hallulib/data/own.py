"""Anybody's files: notes, prompts, ready-made preference pairs and chats into the row schema.

The columns say which of four forms a row has:

    context + reference              the recipe's template makes the prompt
    prompt + reference               (or + completion, TRL's name for it)
    prompt + chosen + rejected       text, or TRL's lists of role and content; also with context
    messages (or conversations)      a chat: every answer of the assistant is a row
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hallulib.data.chats import (
    find_examples,
    read_completion,
    read_turns,
    split_preference,
    write_prompt,
)
from hallulib.data.files import check_unique_ids, read_records, require_text
from hallulib.data.schema import build_prompt, hash_context, make_row
from hallulib.errors import DataError
from hallulib.files import display_path

Record = dict[str, Any]
Row = dict[str, str]
# other tools' names of our columns; a name that data.columns gives goes before them
ALIASES = {"conversations": "messages", "completion": "reference"}


def stream_own_rows(
    path: str | Path,
    template: str,
    columns: Mapping[str, str],
    encoding: str,
    dropped: Counter[str],
) -> Iterator[Row]:
    """Yield the rows of the user's own file, one at a time.

    columns: our name -> the file's name. Optional columns are id and group_id (document or patient;
    without it, rows with the same note form a group). Rows with an empty side are counted in
    `dropped` by reason; a missing column, null or NaN raises DataError with file, row and column.
    """
    return check_unique_ids(_stream_rows(path, template, columns, encoding, dropped), path)


def _stream_rows(path, template, columns, encoding, dropped) -> Iterator[Row]:
    for number, found in read_records(path, encoding):
        record = rename_columns(found, columns, path, number)
        rows = list(_read_rows(record, template, path, number))
        if not rows:
            dropped["chat_without_answer"] += 1
        for row in rows:
            reason = _find_reason_to_drop(row, is_pair="chosen" in record)
            if reason:
                dropped[reason] += 1
            else:
                yield row


def rename_columns(
    record: Record, columns: Mapping[str, str], path: str | Path, number: int
) -> Record:
    """The record under our names. Raises DataError if a mapped column is not there."""
    for ours, theirs in columns.items():
        if theirs not in record:
            raise DataError(
                f"{display_path(path)}, row {number}: no column {theirs!r}, which data.columns "
                f"gives for {ours!r} (there are: {', '.join(map(str, record))})",
                "correct data.columns in the recipe",
            )
    mapped = {ours: record[theirs] for ours, theirs in columns.items()}
    rest = {name: v for name, v in record.items() if name not in columns.values()}
    for theirs, ours in ALIASES.items():
        if theirs in rest and ours not in rest:
            rest[ours] = rest.pop(theirs)
    return rest | mapped


def _read_rows(record: Record, template: str, path: str | Path, number: int) -> Iterator[Row]:
    row_id = _read_name(record, "id", path, number) or f"row-{number}"
    group = _read_name(record, "group_id", path, number)
    if "messages" in record:
        turns = read_turns(record["messages"], _place(path, number, "messages"))
        for count, example in enumerate(find_examples(turns), start=1):
            own_id = row_id if count == 1 else f"{row_id}-{count}"
            chat = group or hash_context(next(t.text for t in turns if t.role != "system"))
            yield make_row(own_id, chat, "chat", example.prompt, example.answer, example.context)
        return
    prompt, context = _read_prompt(record, template, path, number)
    reference, rejected = _read_sides(record, path, number)
    group = group or hash_context(context)
    yield make_row(row_id, group, "file", prompt, reference.strip(), context, rejected.strip())


def _read_prompt(record: Record, template: str, path: str | Path, number: int) -> tuple[str, str]:
    """The prompt, and the text that an answer is judged against."""
    if "context" in record:
        context = require_text(record, "context", path, number)
        return build_prompt(template, context), context
    if isinstance(record.get("prompt"), list):
        turns = read_turns(record["prompt"], _place(path, number, "prompt"))
        return write_prompt(turns), write_prompt([t for t in turns if t.role != "system"])
    if "prompt" not in record and isinstance(record.get("chosen"), list):
        sides = record["chosen"], record.get("rejected")
        turns, _, _ = split_preference(*sides, _place(path, number))
        return write_prompt(turns), write_prompt([t for t in turns if t.role != "system"])
    text = require_text(record, "prompt" if "prompt" in record else "context", path, number)
    return text, text


def _read_sides(record: Record, path: str | Path, number: int) -> tuple[str, str]:
    """The reference (the chosen side) and the rejected side, "" where the row has none."""
    if "chosen" not in record:
        if isinstance(record.get("reference"), list):
            return read_completion(record["reference"], _place(path, number, "reference")), ""
        return require_text(record, "reference", path, number), ""
    if not isinstance(record.get("rejected"), list):
        require_text(record, "rejected", path, number)
    if "prompt" not in record and "context" not in record:
        _, chosen, rejected = split_preference(
            record["chosen"], record["rejected"], _place(path, number)
        )
        return chosen, rejected
    sides = [read_completion(record[s], _place(path, number, s)) for s in ("chosen", "rejected")]
    return sides[0], sides[1]


def _find_reason_to_drop(row: Row, is_pair: bool) -> str | None:
    if not row["context"].strip():
        return "blank_context"
    if not row["reference"]:
        return "blank_reference"
    if is_pair and not row["rejected"]:
        return "blank_rejected"
    return "identical_sides" if row["reference"] == row["rejected"] else None


def _read_name(record: Record, column: str, path: str | Path, number: int) -> str:
    """An id as text; "" where there is none. 3.0 or nan are no ids: a spreadsheet made them."""
    value = record.get(column)
    if value is None or value == "":
        return ""
    if isinstance(value, str):
        return require_text(record, column, path, number)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"{_place(path, number, column)}: {value!r} is neither text nor a whole number",
        "write ids as text, or leave the column out",
    )


def _place(path: str | Path, number: int, column: str = "") -> str:
    return f"{display_path(path)}, row {number}" + (f", column {column!r}" if column else "")
