"""The assessment's event file: its rows, its taxonomy, and a log that a crash cannot corrupt.

`<session>.events.jsonl` is one JSON object per line: a header, then events in the order in which
they happened. Nothing is ever rewritten; undoing is an event of its own. Replaying the file gives
the state, so the file *is* the session.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hallulib.errors import SessionError
from hallulib.files import display_path, storage_guard, write_text_atomic

SCHEMA_VERSION = 1
TAXONOMY_VERSION = 1

# After CREOLA (npj Digit Med 2025;8:274), with `detail` and `other` added.
ERROR_TYPES = {
    "fabrication": "stated, but nowhere in the note",
    "negation": "the note says the opposite",
    "detail": "wrong number, dose, time, side or name",
    "causality": "a cause or effect the note does not state",
    "contextual": "true of another person, section or time",
    "other": "none of the above",
}
SEVERITIES = {
    "minor": "would not change diagnosis or treatment",
    "major": "could change diagnosis or treatment if left uncorrected",
}
SIMULATED = "simulated"

Verdict = Literal["supported", "hallucinated", "unsure"]
# "general_knowledge": not in the note but true in general; kept apart, never counted as an error.
SentenceVerdict = Literal["supported", "hallucinated", "unsure", "general_knowledge"]
ErrorType = Literal["fabrication", "negation", "detail", "causality", "contextual", "other"]
Severity = Literal["minor", "major"]
Action = Literal[
    "open", "grade", "preference", "adjudicate", "skip", "flag", "note", "suggest", "undo",
    "unblind",
]


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SentenceGrade(_Row):
    """The grade of one sentence; `summary[start:end] == text`. Type and severity only describe a
    hallucination."""

    statement_id: str
    start: int
    end: int
    text: str
    verdict: SentenceVerdict
    type: ErrorType | None = None
    severity: Severity | None = None
    note: str = ""

    @model_validator(mode="after")
    def _type_needs_hallucination(self) -> SentenceGrade:
        if self.verdict != "hallucinated" and (self.type or self.severity):
            raise ValueError(f"a sentence graded '{self.verdict}' has no error type or severity")
        return self


class Omission(_Row):
    """Something the note says and the summary should have said."""

    text: str
    severity: Severity = "minor"


class Header(_Row):
    """First line of the file: who grades what, and the hashes that seal it."""

    schema_version: int = SCHEMA_VERSION
    session_id: str
    assessor_id: str
    assessor_kind: Literal["human", "simulated"]
    created_utc: str
    seed: int
    taxonomy_version: int = TAXONOMY_VERSION
    items_sha256: str
    blind_key_sha256: str
    guideline_sha256: str = ""
    mode: Literal["single", "ab"]
    role: Literal["assess", "adjudicate", "practice"] = "assess"
    items: int
    repeat_share: float


class Event(_Row):
    """One thing that happened. `order_index` is the place in the queue; `slot` is 1 or, beside it,
    2. `preference` runs from -2 (summary 1 much better) to 2 (summary 2 much better).

    A "grade" without `verdict` is a part of one: the labels or the omissions given so far.
    `suggested` says whether the detector's suggestions were seen on this item before the action.
    """

    schema_version: int = SCHEMA_VERSION
    seq: int
    ts_utc: str
    action: Action
    order_index: int | None = None
    item_id: str | None = None
    slot: Literal[1, 2] | None = None
    is_repeat: bool | None = None
    verdict: Verdict | None = None
    labels: tuple[SentenceGrade, ...] = ()
    omissions: tuple[Omission, ...] | None = None
    preference: Literal[-2, -1, 0, 1, 2] | None = None
    flagged: bool | None = None
    suggested: bool | None = None
    note: str | None = None
    elapsed_ms: int | None = None
    undo_of: int | None = None


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def to_line(row: _Row) -> bytes:
    """One row as one line of UTF-8 JSON. JSON escapes line breaks, so a row is always one line."""
    return row.model_dump_json(exclude_none=True).encode() + b"\n"


@dataclass
class EventLog:
    """An open event file: append-only, every event on the disk before `append` returns.

    `torn_bytes` counts what a crash left of an unfinished last line; it is reported, not guessed.
    """

    path: Path
    header: Header
    events: list[Event] = field(default_factory=list)
    torn_bytes: int = 0
    _good_size: int = 0

    @classmethod
    def create(cls, path: Path, header: Header) -> EventLog:
        """Start a file. The header is written atomically, so a file without one cannot exist."""
        write_text_atomic(path, to_line(header).decode())
        return cls(path, header, _good_size=path.stat().st_size)

    @classmethod
    def read(cls, path: Path) -> EventLog:
        """Read a file; it is not changed. An unfinished last line is counted and left out.

        Raises SessionError when a line before the last is damaged, missing or from a newer version.
        """
        data = path.read_bytes()
        body, _, tail = data.rpartition(b"\n")
        lines = body.split(b"\n") if body else []
        torn = len(tail)
        if tail and _is_json_object(tail):  # only the line break is missing: the event is whole
            lines, torn = [*lines, tail], 0
        if not lines:
            raise _damaged(path, 1, "the header is missing")
        header = _parse(Header, lines[0], path, 1)
        if header.schema_version != SCHEMA_VERSION:
            raise _damaged(path, 1, f"schema version {header.schema_version} is not known")
        events = [_parse(Event, line, path, n) for n, line in enumerate(lines[1:], start=2)]
        for number, event in enumerate(events, start=1):
            if event.seq != number:
                raise _damaged(path, number + 1, f"event {number} expected, found {event.seq}")
        return cls(path, header, events, torn, len(data) - torn)

    def repair(self) -> None:
        """Cut an unfinished last line off, so that the next event starts on a line of its own."""
        with storage_guard(self.path), open(self.path, "r+b") as file:
            file.truncate(self._good_size)
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
                self._good_size += 1
            file.flush()
            os.fsync(file.fileno())

    def append(self, event: Event) -> None:
        """Write one event, onto the disk. Raises HallulibError, with the file as it was before."""
        line = to_line(event)
        with storage_guard(self.path):
            try:
                with open(self.path, "ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, self._good_size)
                raise
        self._good_size += len(line)
        self.events.append(event)


def _is_json_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def _parse(kind: type, line: bytes, path: Path, number: int):
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise _damaged(path, number, error.errors()[0]["msg"]) from None


def _damaged(path: Path, number: int, why: str) -> SessionError:
    return SessionError(
        f"Line {number} of {display_path(path)} cannot be read: {why}.",
        "Keep a copy of the file, mend that line by hand or move the file away; the next session "
        "then starts anew.",
    )


def check_consistent(verdict: str, sentences: Sequence[SentenceGrade]) -> None:
    """Raises SessionError for a summary called supported with a sentence called hallucinated."""
    if verdict == "supported" and any(s.verdict == "hallucinated" for s in sentences):
        raise SessionError(
            "A summary with a hallucinated sentence cannot be 'supported'.",
            "Grade it 'hallucinated', or correct the sentence.",
        )
