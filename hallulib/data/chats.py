"""Conversations: OpenAI's `messages`, ShareGPT's `conversations`, TRL's lists of role and content.

Each answer of the assistant is one example; what stands before it is its prompt. A prompt is one
text here, so earlier turns are written out with who said them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hallulib.data.files import check_text
from hallulib.errors import DataError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool",
}  # fmt: skip
_NAMES = {"user": "User", "assistant": "Assistant", "tool": "Tool"}


@dataclass(frozen=True)
class Turn:
    """Who says what: role is system, user, assistant or tool."""

    role: str
    text: str


@dataclass(frozen=True)
class Example:
    """A prompt, what of it is not the system's (the context), and the answer."""

    prompt: str
    context: str
    answer: str


def read_turns(messages: Any, place: str) -> list[Turn]:
    """The turns of a list of {role, content} (OpenAI, TRL) or {from, value} (ShareGPT).

    Raises DataError at `place` for anything else, naming the turn. A turn without text (a tool
    call) is an empty one; a picture is refused.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(
            f"{place}: {type(messages).__name__}, not a list of messages",
            "write a list of {role, content}; CSV cannot hold one, so use JSONL or parquet",
        )
    return [_read_turn(m, f"{place}, message {i}") for i, m in enumerate(messages, start=1)]


def _read_turn(message: Any, place: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{place}: {message!r} is no object", "write {role, content}")
    said, content = message.get("role", message.get("from")), message.get("content")
    if "content" not in message:
        content = message.get("value")
    if said not in ROLES:
        raise DataError(
            f"{place}: the role is {said!r}", f"use one of {', '.join(sorted(ROLES))}"
        )
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        return Turn(ROLES[said], "")
    if isinstance(content, list):
        content = "\n".join(_read_part(part, place) for part in content)
    return Turn(ROLES[said], check_text(content, place).strip())


def _read_part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text"):
        return check_text(part.get("text"), place)
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise DataError(f"{place}: a part of type {kind!r} is no text", "leave such chats out")


def write_prompt(turns: Sequence[Turn]) -> str:
    """Turns as one prompt: the system's text first; the words alone where one user turn is all."""
    system = [turn.text for turn in turns if turn.role == "system" and turn.text]
    others = [turn for turn in turns if turn.role != "system" and turn.text]
    if len(others) == 1 and others[0].role == "user":
        lines = [others[0].text]
    else:
        lines = [f"{_NAMES[turn.role]}: {turn.text}" for turn in others]
    return "\n\n".join(system + lines)


def find_examples(turns: Sequence[Turn]) -> Iterator[Example]:
    """One example per answer of the assistant that follows a turn of somebody else."""
    for i, turn in enumerate(turns):
        before = [t for t in turns[:i] if t.role != "system"]
        if turn.role == "assistant" and turn.text and any(t.text for t in before):
            yield Example(write_prompt(turns[:i]), write_prompt(before), turn.text)


def read_completion(value: Any, place: str) -> str:
    """A completion: text, or TRL's list with messages of the assistant."""
    if isinstance(value, str) or value is None:
        return check_text(value, place)
    turns = read_turns(value, place)
    if any(turn.role != "assistant" for turn in turns):
        raise DataError(
            f"{place}: a completion may hold the assistant's messages only",
            "put what stands before the answer into the column 'prompt'",
        )
    return "\n\n".join(turn.text for turn in turns)


def split_preference(chosen: Any, rejected: Any, place: str) -> tuple[list[Turn], str, str]:
    """Prompt turns, chosen and rejected of TRL's form without a prompt column.

    Both sides are whole conversations that differ in their last message only.
    """
    left = read_turns(chosen, f"{place}, column 'chosen'")
    right = read_turns(rejected, f"{place}, column 'rejected'")
    if not left or left[:-1] != right[:-1] or {left[-1].role, right[-1].role} != {"assistant"}:
        raise DataError(
            f"{place}: chosen and rejected may differ in their last message, the assistant's",
            "give the shared beginning in a column 'prompt'",
        )
    return left[:-1], left[-1].text, right[-1].text
