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

from hallulib.data import chats
from hallulib.data.files import Record, read_records, require_text
from hallulib.data.schema import Row, build_prompt, hash_context, make_row
from hallulib.errors import DataError
from hallulib.files import display_path, resolve_path

# other tools' names of our columns; a name that data.columns gives goes before them
ALIASES = {"conversations": "messages", "completion": "reference"}


def stream_own_rows(
    path: str | Path,
    template: str,
    dropped: Counter[str],
    columns: Mapping[str, str] | None = None,
    encoding: str = "auto",
) -> Iterator[Row]:
    """Yield the rows of the user's own file, one at a time.

    columns: our name -> the file's name. Optional columns are id and group_id (document or patient;
    without it, rows with the same note form a group). Rows with an empty side are counted in
    `dropped` by reason; a missing column, null or NaN raises DataError with file, row and column.
    """
    path = resolve_path(path)
    for number, found in read_records(path, encoding):
        place = f"{display_path(path)}, row {number}"
        record = rename_columns(found, columns or {}, place)
        rows = list(_read_rows(record, template, place, f"row-{number}"))
        if not rows:
            dropped["chat_without_answer"] += 1
        for row in rows:
            reason = _find_reason_to_drop(row, is_pair="chosen" in record)
            if reason:
                dropped[reason] += 1
            else:
                yield row


def rename_columns(record: Record, columns: Mapping[str, str], place: str) -> Record:
    """The record under our names. Raises DataError if a mapped column is not there."""
    for ours, theirs in columns.items():
        if theirs not in record:
            raise DataError(
                f"{place}: no column {theirs!r}, which data.columns gives for {ours!r} "
                f"(there are: {', '.join(map(str, record))})",
                "correct data.columns in the recipe",
            )
    mapped = {ours: record[theirs] for ours, theirs in columns.items()}
    rest = {name: v for name, v in record.items() if name not in columns.values()}
    for theirs, ours in ALIASES.items():
        if theirs in rest and ours not in rest:
            rest[ours] = rest.pop(theirs)
    return rest | mapped


def _read_rows(record: Record, template: str, place: str, default_id: str) -> Iterator[Row]:
    row_id = _read_name(record, "id", place) or default_id
    group = _read_name(record, "group_id", place)
    if "messages" not in record:
        row = make_row(id=row_id, source="file", **_read_sides(record, template, place))
        yield row | {"group_id": group or hash_context(row["context"])}
        return
    place += ", column 'messages'"
    if not isinstance(record["messages"], list):
        raise DataError(
            f"{place}: {type(record['messages']).__name__}, not a list of messages",
            "write a list of {role, content}; CSV cannot hold one, so use JSONL or parquet",
        )
    turns = chats.read_turns(record["messages"], "user", place)
    for count, (before, answer) in enumerate(chats.find_answers(turns), start=1):
        said = chats.leave_out_system(before)
        yield make_row(
            id=row_id if count == 1 else f"{row_id}-{count}", source="chat",
            group_id=group or hash_context(said[0]["content"]),
            prompt=chats.write_prompt(before), context=chats.write_prompt(said), reference=answer,
        )  # fmt: skip


def _read_sides(record: Record, template: str, place: str) -> dict[str, str]:
    """{prompt, context: what an answer is judged against, reference: the chosen side, rejected}."""
    if isinstance(record.get("chosen"), list) and not {"prompt", "context"} & record.keys():
        record = record | chats.split_sides(record["chosen"], record.get("rejected"), place)
    if "context" in record or "prompt" not in record:
        context = require_text(record, "context", place)
        prompt = build_prompt(template, context)
    else:
        turns = chats.read_turns(record["prompt"], "user", f"{place}, column 'prompt'")
        prompt, context = (
            chats.write_prompt(turns),
            chats.write_prompt(chats.leave_out_system(turns)),
        )
    sides = {"reference": "reference"}
    if "chosen" in record:
        sides = {"reference": "chosen", "rejected": "rejected"}
    answers = {ours: chats.read_answer(record, name, place).strip() for ours, name in sides.items()}
    return {"prompt": prompt, "context": context} | answers


def _find_reason_to_drop(row: Row, is_pair: bool) -> str | None:
    if not row["context"].strip():
        return "blank_context"
    if not row["reference"]:
        return "blank_reference"
    if is_pair and not row["rejected"]:
        return "blank_rejected"
    return "identical_sides" if row["reference"] == row["rejected"] else None


def _read_name(record: Record, column: str, place: str) -> str:
    """An id as text; "" where there is none. 3.0 or nan are no ids: a spreadsheet made them."""
    value = record.get(column)
    if value is None or value == "":
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{place}, column {column!r}: {value!r} is neither text nor a whole number",
            "write ids as text, or leave the column out",
        )
    return require_text(record, column, place)
