"""Anybody's files: notes, prompts, ready-made preference pairs and chats into the row schema.

The columns say which of four forms a row has:

    context + reference              the recipe's template makes the prompt
    prompt + reference               (or + completion, TRL's name for it)
    prompt + chosen + rejected       text, or TRL's lists of role and content; also with context
    messages (or conversations)      a chat: every answer of the assistant is a row

Conversations in OpenAI's, ShareGPT's and TRL's form become lists of {role, content} with the roles
system, user, assistant and tool. A prompt is one text here, so earlier turns are written out with
who said them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hallulib.data.files import Record, check_text, read_records, require_text
from hallulib.data.schema import Row, build_prompt, hash_context, make_row
from hallulib.errors import DataError
from hallulib.files import display_path, resolve_path

# other tools' names of our columns; a name that data.columns gives goes before them
ALIASES = {"conversations": "messages", "completion": "reference"}
Turn = dict[str, str]
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
    turns = read_turns(record["messages"], "user", place)
    for count, (before, answer) in enumerate(find_answers(turns), start=1):
        said = leave_out_system(before)
        yield make_row(
            id=row_id if count == 1 else f"{row_id}-{count}", source="chat",
            group_id=group or hash_context(said[0]["content"]),
            prompt=write_prompt(before), context=write_prompt(said), reference=answer,
        )  # fmt: skip


def _read_sides(record: Record, template: str, place: str) -> dict[str, str]:
    """{prompt, context: what an answer is judged against, reference: the chosen side, rejected}."""
    if isinstance(record.get("chosen"), list) and not {"prompt", "context"} & record.keys():
        record = record | split_sides(record["chosen"], record.get("rejected"), place)
    if "context" in record or "prompt" not in record:
        context = require_text(record, "context", place)
        prompt = build_prompt(template, context)
    else:
        turns = read_turns(record["prompt"], "user", f"{place}, column 'prompt'")
        prompt, context = (
            write_prompt(turns),
            write_prompt(leave_out_system(turns)),
        )
    sides = {"reference": "reference"}
    if "chosen" in record:
        sides = {"reference": "chosen", "rejected": "rejected"}
    answers = {ours: read_answer(record, name, place).strip() for ours, name in sides.items()}
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


def read_turns(value: Any, role: str, place: str) -> list[Turn]:
    """The turns of a list of {role, content} (OpenAI, TRL) or {from, value} (ShareGPT); a text is
    one turn of `role`.

    Raises DataError at `place` for anything else, naming the message. A turn without text (a tool
    call) is an empty one; a picture is refused.
    """
    if isinstance(value, list):
        return [_read_turn(turn, f"{place}, message {i}") for i, turn in enumerate(value, start=1)]
    return [{"role": role, "content": check_text(value, place)}]


def _read_turn(message: Any, place: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{place}: {message!r} is no object", "write {role, content}")
    said = message.get("role", message.get("from"))
    if said not in ROLES:
        raise DataError(f"{place}: the role is {said!r}", f"use one of {', '.join(sorted(ROLES))}")
    content = message.get("content", message.get("value"))
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        content = ""
    if isinstance(content, list):
        content = "\n".join(_read_part(part, place) for part in content)
    return {"role": ROLES[said], "content": check_text(content, place).strip()}


def _read_part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in ("text", "input_text", "output_text"):
        raise DataError(f"{place}: a part of type {kind!r} is no text", "leave such chats out")
    return check_text(part.get("text"), place)


def write_prompt(turns: list[Turn]) -> str:
    """Turns as one prompt: the system's text first; the words alone where one user turn is all."""
    system = [turn["content"] for turn in turns if turn["role"] == "system" and turn["content"]]
    others = [turn for turn in leave_out_system(turns) if turn["content"]]
    if [turn["role"] for turn in others] == ["user"]:
        return "\n\n".join([*system, others[0]["content"]])
    said = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in others]
    return "\n\n".join(system + said)


def leave_out_system(turns: list[Turn]) -> list[Turn]:
    """What was said in the conversation itself: the text that an answer is judged against."""
    return [turn for turn in turns if turn["role"] != "system"]


def find_answers(turns: list[Turn]) -> Iterator[tuple[list[Turn], str]]:
    """(what stands before, answer) for each answer of the assistant to somebody else's turn."""
    for i, turn in enumerate(turns):
        asked = any(before["content"] for before in leave_out_system(turns[:i]))
        if turn["role"] == "assistant" and turn["content"] and asked:
            yield turns[:i], turn["content"]


def read_answer(record: Record, column: str, place: str) -> str:
    """A completion: text, or TRL's list with messages of the assistant."""
    if not isinstance(record.get(column), list):
        return require_text(record, column, place)
    place = f"{place}, column {column!r}"
    turns = read_turns(record[column], "assistant", place)
    if any(turn["role"] != "assistant" for turn in turns):
        raise DataError(
            f"{place}: a completion may hold the assistant's messages only",
            "put what stands before the answer into the column 'prompt'",
        )
    return "\n\n".join(turn["content"] for turn in turns)


def split_sides(chosen: Any, rejected: Any, place: str) -> dict[str, list[Turn]]:
    """TRL's form without a prompt column as one with prompt, chosen and rejected.

    Both sides are whole conversations that differ in their last message only.
    """
    left = read_turns(chosen, "assistant", f"{place}, column 'chosen'")
    right = read_turns(rejected, "assistant", f"{place}, column 'rejected'")
    answers = left[-1:] + right[-1:]
    if left[:-1] != right[:-1] or [turn["role"] for turn in answers] != ["assistant"] * 2:
        raise DataError(
            f"{place}: chosen and rejected may differ in their last message, the assistant's",
            "give the shared beginning in a column 'prompt'",
        )
    return {"prompt": left[:-1], "chosen": left[-1:], "rejected": right[-1:]}
