"""The files of a session, a log of actions that a crash cannot corrupt, and what they add up to.

`<name>.events.jsonl` begins with a header and then has one line per action, in the order in which
they happened. Nothing is ever rewritten; undoing is an action of its own. The systems stand in
`<name>.key.json` alone, whose hash seals the header.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hallulib.assessment.queue import Place
from hallulib.errors import SessionError
from hallulib.files import (
    display_path,
    sha256_file,
    sha256_text,
    storage_guard,
    write_json_atomic,
    write_jsonl,
)

VERSION = 2
Do = Literal["label", "grade", "prefer", "omit", "skip", "flag", "note", "show", "suggest", "undo",
             "unblind", "torn"]  # fmt: skip
Verdict = Literal["supported", "hallucinated", "unsure", "general_knowledge"]
# After CREOLA (npj Digit Med 2025;8:274), with `detail` and `other` added.
ErrorType = Literal["fabrication", "negation", "detail", "causality", "contextual", "other"]
ERROR_TYPES = get_args(ErrorType)


class Action(BaseModel):
    """One line of the file: "label" grades one sentence, "grade" ends the item with a verdict.

    `place` counts in the queue from 0. `preference` runs from -2 (summary 1 much better) to 2.
    "general_knowledge": not in the note but true in general; kept apart, never an error.
    `suggested`: the detector's opinion on this item had been seen before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    n: int
    at: str
    do: Do
    place: int | None = None
    sentence: str | None = None
    verdict: Verdict | None = None
    type: ErrorType | None = None
    severity: Literal["minor", "major"] | None = None
    preference: Literal[-2, -1, 0, 1, 2] | None = None
    text: str | None = None
    on: bool | None = None
    seconds: float | None = None
    suggested: bool | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Action:
        given = {"label": self.verdict, "grade": self.verdict, "prefer": self.preference}
        if given.get(self.do, "") is None:
            raise ValueError(f"'{self.do}' lacks its verdict or preference")
        if self.do == "grade" and self.verdict == "general_knowledge":
            raise ValueError("'general_knowledge' is a verdict on a sentence")
        if self.do == "label" and self.verdict != "hallucinated" and (self.type or self.severity):
            raise ValueError(f"a sentence graded '{self.verdict}' has no error type or severity")
        return self


@dataclass
class Log:
    """What the files of a session hold. `torn`: bytes of a last line that a crash left unfinished;
    `append` cuts them off."""

    path: Path
    header: dict[str, Any]
    queue: list[Place]
    actions: list[Action]
    torn: int = 0

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".events.jsonl")

    @staticmethod
    def start(path: Path, header: dict[str, Any], queue: list[Place]) -> None:
        """Write the key, then the header that seals it. A salt keeps the key from being guessed."""
        key = path.with_suffix("").with_suffix(".key.json")
        write_json_atomic(key, {"salt": secrets.token_hex(16), "queue": queue})
        sealed = {"version": VERSION, **header, "key_sha256": sha256_file(key), "created": _now()}
        write_jsonl(path, [sealed])

    @classmethod
    def read(cls, path: Path) -> Log:
        """Read a session without locking or changing it. Raises SessionError for a damaged line,
        a file of another version, or a key that is not the one the session was sealed with."""
        *lines, tail = path.read_bytes().split(b"\n")
        if _read_object(tail) is not None:  # only the line break is missing
            lines, tail = [*lines, tail], b""
        header = _read_object(lines[0]) if lines else None
        if header is None or header.get("version") != VERSION:
            raise _damaged(path, 1, f"it is no header of version {VERSION}")
        actions = [_read_action(path, number, line) for number, line in enumerate(lines[1:], 1)]
        return cls(path, header, _read_key(path, header.get("key_sha256")), actions, len(tail))

    def repair(self) -> None:
        """Cut a torn line off, so that the next action begins on a line of its own."""
        with storage_guard(self.path), open(self.path, "r+b") as file:
            file.seek(-self.torn, os.SEEK_END)
            file.truncate()
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")

    def append(self, do: str, **values: Any) -> Action:
        """Write one action; it is on the disk on return. Raises HallulibError, with the file as it
        was before, for a value that is none and for a full disk."""
        try:
            action = Action(n=len(self.actions) + 1, at=_now(), do=do, **values)
            line = action.model_dump_json(exclude_none=True) + "\n"
        except ValueError as error:
            raise SessionError(
                f"Not saved: {_explain(error)}.", "Give one of the values named there."
            ) from None
        size = self.path.stat().st_size
        with storage_guard(self.path):
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, size)
                raise
        self.actions.append(action)
        return action


FINAL = ("grade", "prefer", "skip")  # actions that end an item
ON_ITEM = (*FINAL, "label", "omit", "flag", "note")  # what undo takes back; what was seen was seen


@dataclass
class ItemState:
    """What has been said of one item; `answer` is the action that ended it, if one did."""

    labels: dict[str, Action] = field(default_factory=dict)
    answer: Action | None = None
    omitted: Action | None = None
    note: str = ""
    flagged: bool = False

    @property
    def skipped(self) -> bool:
        return self.answer is not None and self.answer.do == "skip"

    @property
    def done(self) -> bool:
        return self.answer is not None and not self.skipped

    @property
    def omissions(self) -> list[str]:
        """What was left out of the summary; the assessor parts several by ";"."""
        texts = self.omitted.text.split(";") if self.omitted else []
        return [text.strip() for text in texts if text.strip()]

    def apply(self, action: Action) -> None:
        """Take in one action; a later one of its kind replaces an earlier one."""
        if action.do == "label":
            self.labels[action.sentence] = action
        elif action.do == "omit":
            self.omitted = action
        elif action.do == "flag":
            self.flagged = bool(action.on)
        elif action.do == "note":
            self.note = action.text or ""
        else:
            self.answer = action


@dataclass
class State:
    """The items, the one that is shown (None at the end), and the actions that undo can reach."""

    items: list[ItemState]
    cursor: int | None
    suggesting: bool = False
    unblinded: bool = False
    seen: set[int] = field(default_factory=set)  # items on which suggestions were in view
    standing: list[Action] = field(default_factory=list)

    @classmethod
    def replay(cls, log: Log) -> State:
        """What the actions of a log add up to. Raises SessionError for one that cannot be."""
        state = cls([ItemState() for _ in log.queue], 0 if log.queue else None)
        for action in log.actions:
            try:
                state.apply(action)
            except IndexError:  # an item that is not in the queue, an undo of nothing
                why = "it does not fit the lines before it"
                raise _damaged(log.path, action.n + 1, why) from None
        return state

    def apply(self, action: Action) -> None:
        """Take in one action; live and replayed sessions do it alike."""
        if action.do in ON_ITEM:
            self.standing.append(action)
            self.items[action.place].apply(action)
            if action.do in FINAL:
                self.cursor = self._find_pending(action.place)
        elif action.do == "undo":
            self._undo()
        elif action.do == "show":
            self.cursor = action.place
        elif action.do == "suggest":
            self.suggesting = bool(action.on)
        elif action.do == "unblind":
            self.unblinded = True
        if self.suggesting and self.cursor is not None:
            self.seen.add(self.cursor)

    def progress(self) -> dict[str, Any]:
        """Counts, and the median `seconds` of an item, None before the first grade."""
        seconds = [item.answer.seconds or 0.0 for item in self.items if item.done]
        return {
            "total": len(self.items),
            "graded": len(seconds),
            "skipped": sum(item.skipped for item in self.items),
            "flagged": sum(item.flagged for item in self.items),
            "seconds": median(seconds) if seconds else None,
        }

    def _undo(self) -> None:
        """Replay the item of the last action without it."""
        place = self.standing.pop().place
        self.items[place], self.cursor = ItemState(), place
        for action in self.standing:
            if action.place == place:
                self.items[place].apply(action)

    def _find_pending(self, place: int) -> int | None:
        """The first item after `place`, wrapping around, that is neither answered nor skipped."""
        total = len(self.items)
        places = ((place + step) % total for step in range(1, total + 1))
        return next((p for p in places if self.items[p].answer is None), None)


def _read_key(path: Path, sealed: str | None) -> list[Place]:
    key = path.with_suffix("").with_suffix(".key.json")
    text = key.read_text("utf-8") if key.exists() else ""
    if sha256_text(text) != sealed:
        state = "not the one the session was sealed with" if text else "missing"
        raise SessionError(
            f"The key {display_path(key)} is {state}; without it no grade has a system.",
            "Put the key back, or start a new session under another name.",
        )
    return json.loads(text)["queue"]


def _read_object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _read_action(path: Path, number: int, line: bytes) -> Action:
    try:
        action = Action.model_validate_json(line)
    except ValidationError as error:
        raise _damaged(path, number + 1, _explain(error)) from None
    if action.n != number:
        raise _damaged(path, number + 1, f"action {number} expected, found {action.n}")
    return action


def _explain(error: ValueError) -> str:
    if not isinstance(error, ValidationError):  # half an emoji cannot be written
        return f"text: {error}"
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]


def _damaged(path: Path, number: int, why: str) -> SessionError:
    return SessionError(
        f"Line {number} of {display_path(path)} cannot be read: {why}.",
        "Keep a copy of the file, mend that line by hand or move the file away; the next session "
        "then starts anew.",
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
