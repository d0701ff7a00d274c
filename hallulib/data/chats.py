"""Conversations: OpenAI's `messages`, ShareGPT's `conversations`, TRL's lists of role and content.

All become lists of {role, content} with the roles system, user, assistant and tool. A prompt is one
text here, so earlier turns are written out with who said them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hallulib.data.files import Record, check_text, require_text
from hallulib.errors import DataError

Turn = dict[str, str]
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool",
}  # fmt: skip


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
