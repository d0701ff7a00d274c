"""Anybody's files: notes, prompts, ready-made preference pairs and chats into the row schema.

The columns say which form a row has: context or prompt with reference (TRL: completion), the same
with chosen and rejected, or messages (ShareGPT: conversations), a chat of which every answer of the
assistant is a row. A prompt is one text here, so earlier turns are written out with who said them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hallulib.data.files import Record, check_text, read_records, read_text
from hallulib.data.schema import Row, build_prompt, hash_context, make_row
from hallulib.errors import DataError
from hallulib.files import display_path, resolve_path

Turn = dict[str, str]
ALIASES = {"conversations": "messages", "completion": "reference"}  # other tools' names of ours
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool",
}  # fmt: skip


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
        record = _rename_columns(found, columns or {}, place)
        name = _read_id(record, "id", place) or f"row-{number}"
        group = _read_id(record, "group_id", place)
        read_form = _read_chat if "messages" in record else _read_sides
        rows = read_form(record, template, place)
        if not rows:
            dropped["chat_without_answer"] += 1
        for count, row in enumerate(rows, start=1):
            reason = _find_reason_to_drop(row, is_pair="chosen" in record)
            if reason:
                dropped[reason] += 1
                continue
            row["id"] = name if count == 1 else f"{name}-{count}"
            yield row | {"group_id": group or row["group_id"]}


def _rename_columns(record: Record, columns: Mapping[str, str], place: str) -> Record:
    """The record under our names; a name that `columns` gives goes before other tools' names."""
    for theirs in columns.values():
        if theirs not in record:
            there = ", ".join(map(str, record))
            what = f"{place}: no column {theirs!r}, which data.columns names (there are: {there})"
            raise DataError(what, "correct data.columns in the recipe")
    rest = {name: value for name, value in record.items() if name not in columns.values()}
    aliased = {ours: rest[theirs] for theirs, ours in ALIASES.items() if theirs in rest}
    return aliased | rest | {ours: record[theirs] for ours, theirs in columns.items()}


def _read_id(record: Record, column: str, place: str) -> str:
    """An id as text; "" where there is none. 3.0 or nan are no ids: a spreadsheet made them."""
    value = "" if record.get(column) is None else record[column]
    if type(value) not in (int, str):
        what = f"{place}, column {column!r}: {value!r} is neither text nor a whole number"
        raise DataError(what, "write ids as text, or leave the column out")
    return check_text(str(value), f"{place}, column {column!r}")


def _read_sides(record: Record, template: str, place: str) -> list[Row]:
    """The row of a note or prompt with its answer, or with two: reference is the chosen side."""
    is_pair = "chosen" in record
    if is_pair and isinstance(record["chosen"], list) and not {"prompt", "context"} & record.keys():
        record = record | _split_sides(record, place)
    if "context" in record or "prompt" not in record:
        context = read_text(record, "context", place)
        prompt = build_prompt(template, context)
    else:
        prompt, context = _write_prompt(_read_turns(record, "prompt", "user", place))
    row = make_row(source="file", group_id=hash_context(context), prompt=prompt, context=context)
    row["reference"] = _read_answer(record, "chosen" if is_pair else "reference", place)
    row["rejected"] = _read_answer(record, "rejected", place) if is_pair else ""
    return [row]


def _read_chat(record: Record, template: str, place: str) -> list[Row]:
    """A row for each answer of the assistant to somebody else's turn; they form one group."""
    if not isinstance(record["messages"], list):
        kind = type(record["messages"]).__name__
        what = f"{place}, column 'messages': {kind}, not a list of messages"
        raise DataError(what, "write a list of {role, content}, in JSON, JSON Lines or parquet")
    turns = _read_turns(record, "messages", "user", place)
    rows: list[Row] = []
    for i, turn in enumerate(turns):
        prompt, context = _write_prompt(turns[:i])
        if turn["role"] == "assistant" and turn["content"] and context:
            first = next(t["content"] for t in turns if t["role"] != "system" and t["content"])
            row = {"prompt": prompt, "context": context, "reference": turn["content"]}
            rows.append(make_row(source="chat", group_id=hash_context(first), **row))
    return rows


def _find_reason_to_drop(row: Row, is_pair: bool) -> str | None:
    if not row["context"].strip():
        return "blank_context"
    if not row["reference"]:
        return "blank_reference"
    if is_pair and not row["rejected"]:
        return "blank_rejected"
    return "identical_sides" if row["reference"] == row["rejected"] else None


def _read_turns(record: Record, column: str, role: str, place: str) -> list[Turn]:
    """The turns in a cell: {role, content} (OpenAI, TRL) or {from, value} (ShareGPT); a text is one
    turn of `role`. Raises DataError naming the message."""
    if not isinstance(record.get(column), list):
        return [{"role": role, "content": read_text(record, column, place)}]
    place = f"{place}, column {column!r}, message"
    return [_read_turn(turn, f"{place} {i}") for i, turn in enumerate(record[column], start=1)]


def _read_turn(message: Any, place: str) -> Turn:
    """A turn without text (a tool call) is an empty one; a picture is refused."""
    if not isinstance(message, dict):
        raise DataError(f"{place}: {message!r} is no object", "write {role, content}")
    said = message.get("role", message.get("from"))
    if said not in ROLES:
        raise DataError(f"{place}: the role is {said!r}", f"use one of {', '.join(sorted(ROLES))}")
    content = message.get("content", message.get("value"))
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        content = ""
    if isinstance(content, list):  # parts, of which only texts can be read
        parts = [part.get("text", part) if isinstance(part, dict) else part for part in content]
        content = "\n".join(check_text(part, place) for part in parts)
    return {"role": ROLES[said], "content": check_text(content, place).strip()}


def _write_prompt(turns: list[Turn]) -> tuple[str, str]:
    """(prompt: the system's text and what was said, context: what was said, without the system).

    Who says what is written out, but not where one turn of the user is all.
    """
    system = [turn["content"] for turn in turns if turn["role"] == "system" and turn["content"]]
    others = [turn for turn in turns if turn["role"] != "system" and turn["content"]]
    said = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in others]
    if [turn["role"] for turn in others] == ["user"]:
        said = [others[0]["content"]]
    return "\n\n".join(system + said), "\n\n".join(said)


def _read_answer(record: Record, column: str, place: str) -> str:
    """A completion: text, or TRL's list with messages of the assistant."""
    turns = _read_turns(record, column, "assistant", place)
    if any(turn["role"] != "assistant" for turn in turns):
        what = f"{place}, column {column!r}: an answer may hold the assistant's messages only"
        raise DataError(what, "put what stands before the answer into the column 'prompt'")
    return "\n\n".join(turn["content"] for turn in turns).strip()


def _split_sides(record: Record, place: str) -> dict[str, list[Turn]]:
    """TRL's form without a prompt column as one with prompt, chosen and rejected: two whole
    conversations that differ in their last message only."""
    left, right = (_read_turns(record, side, "assistant", place) for side in ("chosen", "rejected"))
    if left[:-1] != right[:-1]:
        what = f"{place}: chosen and rejected may differ in their last message only"
        raise DataError(what, "give the shared beginning in a column 'prompt'")
    return {"prompt": left[:-1], "chosen": left[-1:], "rejected": right[-1:]}
