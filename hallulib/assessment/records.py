"""Sessions as read from their files, without opening them for writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hallulib.assessment.events import SIMULATED, EventLog, Header
from hallulib.assessment.opening import read_generations, read_sealed_key
from hallulib.assessment.queue import Slotting, fill_queue, hash_entries, index_rows
from hallulib.assessment.state import SessionState
from hallulib.errors import SessionError
from hallulib.files import sha256_text
from hallulib.run import Run

GENERATIONS = "evaluation/generations.jsonl"


@dataclass(frozen=True)
class SessionRecord:
    """A session as read from its files, without opening it for writing."""

    header: Header
    queue: list[Slotting]
    state: SessionState
    torn_bytes: int
    digest: str

    def verdicts(self) -> list[tuple[str, str, str, bool]]:
        """(item id, system, verdict, is a repeat) for every graded summary."""
        return [
            (slotting.item_id, slotting.systems[slot - 1], grade.verdict, bool(grade.is_repeat))
            for slotting, entry in zip(self.queue, self.state.entries, strict=True)
            for slot, grade in sorted(entry.grades.items())
            if not entry.skipped
        ]


def read_session(events_path: Path) -> SessionRecord:
    """Read a session's files without locking or changing them; a torn last line is left out.

    Raises SessionError when the blind key is not the one whose hash the header holds.
    """
    log = EventLog.read(events_path)
    queue = read_sealed_key(events_path, log.header)
    state = SessionState.replay(log.header.mode, len(queue), log.events)
    lines = [event.model_dump_json() for event in log.events if event.action != "open"]
    return SessionRecord(log.header, queue, state, log.torn_bytes, sha256_text("\n".join(lines)))


def read_sessions(run: Run) -> list[SessionRecord]:
    """Every session of a run, in the order of their names."""
    return [read_session(path) for path in sorted(run.path("assessment").glob("*.events.jsonl"))]


def keep_current(records: Sequence[SessionRecord], run: Run) -> list[SessionRecord]:
    """Those about the summaries that the run holds now."""
    rows = index_rows(read_generations(run.require(GENERATIONS)))
    return [record for record in records if _shows_these(record, rows)]


def choose_assessors(records: Sequence[SessionRecord], mode: str = "") -> list[SessionRecord]:
    """Sessions with a grade, the fullest first: people's, or where no person graded, scripts'.

    One for each assessor (their fullest; of equally full ones the newest) and no adjudications.
    """
    graded = [
        record for record in records
        if record.header.role == "assess" and record.state.progress().graded
        and mode in ("", record.header.mode)
    ]  # fmt: skip
    people = [record for record in graded if record.header.assessor_kind != SIMULATED]
    newest_first = sorted(people or graded, key=lambda r: r.header.created_utc, reverse=True)
    ordered = sorted(newest_first, key=lambda r: -r.state.progress().graded)
    own: dict[str, SessionRecord] = {}
    for record in ordered:
        own.setdefault(record.header.assessor_id, record)
    return list(own.values())


def _shows_these(record: SessionRecord, rows: dict[tuple[str, str], dict]) -> bool:
    try:
        entries = fill_queue(record.queue, rows)
    except SessionError:
        return False
    return hash_entries(entries) == record.header.items_sha256
