"""What the events of a session add up to. Live and replayed sessions use the same code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from hallulib.assessment.events import Event, Omission, SentenceGrade
from hallulib.errors import SessionError

_ANSWERS = ("grade", "preference", "adjudicate", "skip")
# What undo takes back; "open", "suggest" (what was seen was seen) and "unblind" stay.
_UNDOABLE = (*_ANSWERS, "flag", "note")


@dataclass(frozen=True)
class Progress:
    """Counts of a queue; `unfinished` = not graded, whether skipped or not yet seen."""

    total: int
    graded: int
    skipped: int
    flagged: int
    median_seconds: float | None

    @property
    def unfinished(self) -> int:
        return self.total - self.graded

    @property
    def remaining_seconds(self) -> float | None:
        """Estimate for the entries not yet answered; None before the first grade."""
        if self.median_seconds is None:
            return None
        return self.median_seconds * (self.unfinished - self.skipped)


@dataclass
class EntryState:
    """What the assessor has said about one entry; `grades` by slot (1, and 2 in mode ab).

    `labels` (by statement id) and `omissions` are what stands so far, before the entry is done too.
    """

    mode: str
    grades: dict[int, Event] = field(default_factory=dict)
    labels: dict[str, SentenceGrade] = field(default_factory=dict)
    omissions: tuple[Omission, ...] = ()
    preference: Event | None = None
    skipped: bool = False
    flagged: bool = False
    note: str = ""
    elapsed_ms: int = 0

    @property
    def done(self) -> bool:
        """Whether the answer that the mode asks for has been given (and not skipped since)."""
        answer = self.preference if self.mode == "ab" else self.grades.get(1)
        return answer is not None and not self.skipped

    def apply(self, event: Event) -> None:
        """Take in one event of this entry; a later answer replaces an earlier one."""
        if event.action == "flag":
            self.flagged = bool(event.flagged)
        elif event.action == "preference":
            self.preference = event
        elif event.verdict is not None:
            self.grades[event.slot or 1] = event
        if event.slot in (None, 1):
            self.labels |= {label.statement_id: label for label in event.labels}
        if event.omissions is not None:
            self.omissions = event.omissions
        if is_answer(event):
            self.skipped = event.action == "skip"
            self.elapsed_ms = event.elapsed_ms or 0
        if event.note is not None:
            self.note = event.note


def is_answer(event: Event) -> bool:
    """Whether an event can end an entry; a part of a grade does not."""
    partial = event.action == "grade" and event.verdict is None
    return event.action in _ANSWERS and not partial


class SessionState:
    """Entries in queue order, and the one that is shown (`cursor`; None when none is pending)."""

    def __init__(self, mode: str, total: int) -> None:
        self.mode = mode
        self.entries = [EntryState(mode) for _ in range(total)]
        self.cursor: int | None = 0 if total else None
        self.unblinded = False
        self.suggesting = False  # whether suggestions are shown now
        self.suggested: set[int] = set()  # entries on which they have been seen
        self._actions: list[Event] = []  # those not undone, in order
        self._by_entry: list[list[Event]] = [[] for _ in range(total)]

    @classmethod
    def replay(cls, mode: str, total: int, events: Iterable[Event]) -> SessionState:
        """The state after `events`. Raises SessionError for an undo of nothing or a wrong index."""
        state = cls(mode, total)
        for event in events:
            state.apply(event)
        return state

    @property
    def last_action(self) -> Event | None:
        """What undo would take back."""
        return self._actions[-1] if self._actions else None

    def apply(self, event: Event) -> None:
        """Take in one event."""
        place = event.order_index
        if place is not None and not 0 <= place < len(self.entries):
            raise _inconsistent(event, f"there is no entry {place}")
        if event.action == "unblind":
            self.unblinded = True
        elif event.action == "suggest":
            self.suggesting = bool(event.suggested)
        elif event.action == "open" and place is not None:
            self.cursor = place
        elif event.action == "undo":
            self._undo(event)
        elif event.action in _UNDOABLE:
            self._act(event)
        if self.suggesting and self.cursor is not None:
            self.suggested.add(self.cursor)

    def progress(self) -> Progress:
        """Counts, and the median time of an answered entry in seconds."""
        graded = [entry for entry in self.entries if entry.done]
        return Progress(
            total=len(self.entries),
            graded=len(graded),
            skipped=sum(entry.skipped for entry in self.entries),
            flagged=sum(entry.flagged for entry in self.entries),
            median_seconds=median(e.elapsed_ms for e in graded) / 1000 if graded else None,
        )

    def _act(self, event: Event) -> None:
        if event.order_index is None:
            raise _inconsistent(event, f"'{event.action}' names no entry")
        self._actions.append(event)
        self._by_entry[event.order_index].append(event)
        entry = self.entries[event.order_index]
        entry.apply(event)
        if is_answer(event) and (entry.done or entry.skipped):
            self.cursor = self._next_pending(event.order_index)

    def _undo(self, event: Event) -> None:
        if self.last_action is None or self.last_action.seq != event.undo_of:
            raise _inconsistent(event, f"it undoes event {event.undo_of}, which is not the last")
        target = self._actions.pop()
        place = target.order_index
        self._by_entry[place].remove(target)
        self.entries[place] = EntryState(self.mode)
        for kept in self._by_entry[place]:
            self.entries[place].apply(kept)
        self.cursor = place

    def _next_pending(self, place: int) -> int | None:
        """The first entry after `place`, wrapping around, that is neither answered nor skipped."""
        total = len(self.entries)
        for step in range(1, total + 1):
            entry = self.entries[(place + step) % total]
            if not entry.done and not entry.skipped:
                return (place + step) % total
        return None


def _inconsistent(event: Event, why: str) -> SessionError:
    return SessionError(
        f"Event {event.seq} of the session does not fit the events before it: {why}.",
        "Keep a copy of the event file and move it away; the next session then starts anew.",
    )
