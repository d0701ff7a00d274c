"""The files of a session: a log of actions that a crash cannot corrupt, and what they add up to.

`<name>.events.jsonl` has a header, then a line per action; undoing is one of its own. The systems
stand in `<name>.key.json` alone, whose hash seals the header.
"""

from __future__ import annotations

import json
import secrets
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hallulib import files
from hallulib.assessment.queue import Place
from hallulib.errors import SessionError

VERSION = 2
# After CREOLA (npj Digit Med 2025;8:274), with `detail` and `other` added.
ErrorType = Literal["fabrication", "negation", "detail", "causality", "contextual", "other"]
ERROR_TYPES = get_args(ErrorType)
FINAL = ("grade", "prefer", "skip")  # actions that end an item; "skip" leaves it ungraded
ON_ITEM = (*FINAL, "label", "omit", "flag", "note")  # what undo takes back; what was seen was seen


class Action(BaseModel):
    """One line of the file: "label" grades one sentence, "grade" ends the item with a verdict.

    `place` counts in the queue from 0. `preference` runs from -2 (summary 1 much better) to 2.
    "general_knowledge": not in the note but true in general; kept apart, never an error.
    `suggested`: the detector's opinion on this item had been seen before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    n: int
    at: str
    do: Literal[*ON_ITEM, "show", "suggest", "undo", "unblind", "torn"]
    place: int | None = None
    sentence: str | None = None
    verdict: Literal["supported", "hallucinated", "unsure", "general_knowledge"] | None = None
    type: ErrorType | None = None
    severity: Literal["minor", "major"] | None = None
    preference: Literal[-2, -1, 0, 1, 2] | None = None
    text: str = ""
    on: bool = False
    seconds: float | None = None
    suggested: bool = False

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


def sum_up(actions: list[Action]) -> dict[str, Any]:
    """What the actions that stand say of one item; the last of a kind counts.

    `answer`: the kind of the one that ended it, "" while none has. `labels`: sentence id to
    verdict, type and severity. `omissions`: what was left out, parted by ";" where it was written.
    """
    said: dict[str, Any] = {
        "answer": "", "verdict": None, "preference": None, "seconds": None, "suggested": False,
        "labels": {}, "omissions": [], "note": "", "flagged": False,
    }  # fmt: skip
    for action in actions:
        match action.do:
            case "label":
                grade = {"verdict", "type", "severity"}
                said["labels"][action.sentence] = action.model_dump(include=grade)
            case "omit":
                said["omissions"] = [t.strip() for t in action.text.split(";") if t.strip()]
            case "note":
                said["note"] = action.text
            case "flag":
                said["flagged"] = action.on
            case _:
                answer = {"verdict", "preference", "seconds", "suggested"}
                said |= {"answer": action.do, **action.model_dump(include=answer)}
    return said


class Log:
    """A session as its files hold it, and what its actions add up to: `items` as `sum_up` gives
    them, the one that is shown (`cursor`, None at the end), those `seen` with suggestions in view.
    `torn`: bytes of a last line that a crash left unfinished."""

    def __init__(self, path: Path) -> None:
        """Read without locking or changing anything. Raises SessionError for a damaged line, a
        file of another version, or a key that is not the one the session was sealed with."""
        self.path, self.name = path, path.name.removesuffix(".events.jsonl")
        *lines, tail = path.read_bytes().split(b"\n")
        with suppress(ValueError):  # only the line break is missing
            json.loads(tail)
            lines, tail = [*lines, tail], b""
        self.torn, self.header, self.actions = len(tail), {}, []
        try:
            header = json.loads(lines[0])
            if header.get("version") != VERSION:
                raise ValueError(f"it is no header of version {VERSION}")
            self.header = header
            self._start(_read_key(path, header["key_sha256"]))
            for line in lines[1:]:
                action = Action.model_validate_json(line)
                self.check(action)
                self.take(action)
        except ValueError as error:
            line = len(self.actions) + (2 if self.header else 1)
            raise SessionError(
                f"Line {line} of {files.display_path(path)} cannot be read: {explain(error)}.",
                "Keep a copy, mend that line by hand or move the file away to start anew.",
            ) from None

    def _start(self, queue: list[Place]) -> None:
        self.queue, self.items = queue, [sum_up([]) for _ in queue]
        self.cursor: int | None = 0 if queue else None
        self.seen: set[int] = set()
        self.suggesting = self.unblinded = False
        self.standing: list[Action] = []  # what undo can reach
        self._said: list[list[Action]] = [[] for _ in queue]  # the same by item

    def check(self, action: Action) -> None:
        """Raises ValueError for an action that cannot be the next one."""
        if action.n != len(self.actions) + 1:
            raise ValueError(f"action {len(self.actions) + 1} expected, found {action.n}")
        if action.do in (*ON_ITEM, "show") and action.place not in range(len(self.items)):
            raise ValueError("there is no such item")
        if action.do == "undo" and not self.standing:
            raise ValueError("there is nothing to undo")

    def take(self, action: Action) -> None:
        """Take in an action that has been checked, read or live."""
        place = action.place
        self.actions.append(action)
        if action.do in ON_ITEM:
            self.standing.append(action)
            self._said[place].append(action)
        elif action.do == "undo":
            place = self.standing.pop().place
            self._said[place].pop()
        elif action.do == "suggest":
            self.suggesting = action.on
        elif action.do == "unblind":
            self.unblinded = True
        if place is not None:
            self.items[place] = sum_up(self._said[place])
        if action.do in FINAL:  # on to the next item without an answer, wrapping around
            places = [*range(place + 1, len(self.items)), *range(place + 1)]
            self.cursor = next((i for i in places if not self.items[i]["answer"]), None)
        elif action.do in ("undo", "show"):
            self.cursor = place
        if self.suggesting and self.cursor is not None:
            self.seen.add(self.cursor)

    def progress(self) -> dict[str, Any]:
        """Counts, and the median `seconds` of an item, None before the first grade."""
        done = [
            said["seconds"] or 0.0 for said in self.items if said["answer"] in ("grade", "prefer")
        ]
        return {
            "total": len(self.items),
            "graded": len(done),
            "skipped": sum(said["answer"] == "skip" for said in self.items),
            "flagged": sum(said["flagged"] for said in self.items),
            "seconds": median(done) if done else None,
        }


def start_log(path: Path, header: dict[str, Any], queue: list[Place]) -> None:
    """Write the key, then the header that seals it. A salt keeps the key from being guessed."""
    key = _name_key(path)
    files.write_json_atomic(key, {"salt": secrets.token_hex(16), "queue": queue})
    files.write_jsonl(path, [{"version": VERSION, **header, "key_sha256": files.sha256_file(key)}])


def _name_key(path: Path) -> Path:
    return path.with_name(path.name.replace(".events.jsonl", ".key.json"))


def _read_key(path: Path, sealed: str) -> list[Place]:
    key = _name_key(path)
    if not key.exists() or files.sha256_file(key) != sealed:
        raise SessionError(
            f"The key {files.display_path(key)} is missing, or not the one the session was sealed "
            "with; without it no grade has a system.",
            "Put the key back, or start a new session under another name.",
        )
    return json.loads(key.read_text("utf-8"))["queue"]


def explain(error: ValueError) -> str:
    """What is wrong with an action, in a few words."""
    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors()[0]
    return ": ".join([*map(str, problem["loc"]), problem["msg"]])
