"""The assessment session: a pure state machine over an event file. It knows nothing of widgets.

Every action is on the disk before the method returns; opened again, the session is at the same
item. The names of the systems stay sealed until `unblind()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hallulib.assessment.events import (
    Event,
    EventLog,
    Header,
    Omission,
    SentenceGrade,
    check_consistent,
    utc_now,
)
from hallulib.assessment.lock import SessionLock
from hallulib.assessment.opening import (
    SYSTEMS,
    SessionSettings,
    check_header,
    check_name,
    default_name,
    key_path,
    make_header,
    read_sealed_key,
)
from hallulib.assessment.queue import (
    Entry,
    Slotting,
    add_repeats,
    fill_queue,
    index_rows,
    plan_queue,
    write_blind_key,
)
from hallulib.assessment.state import EntryState, Progress, SessionState
from hallulib.errors import SessionError
from hallulib.files import sha256_text, write_text_atomic


class AssessmentSession:
    """One assessor's pass through one blinded queue, kept in `<folder>/<session>.events.jsonl`.
    Use it in a `with` block or call `close()`; a crash leaves a lock that the next opening removes.
    `warnings` says what was noticed on opening, as a line torn by a crash.
    """

    def __init__(
        self, folder: Path, rows: Iterable[dict], settings: SessionSettings,
        queue: list[Slotting] | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`queue` None: planned from the settings (an adjudication brings its own)."""
        self.warnings: list[str] = []
        self._clock = clock
        indexed = index_rows(rows)
        queue = _plan(indexed, settings) if queue is None else queue
        self.session_id = settings.name or default_name(settings, fill_queue(queue, indexed))
        check_name(self.session_id)
        self.events_path = folder / f"{self.session_id}.events.jsonl"
        self._lock = SessionLock(folder / f"{self.session_id}.lock")
        self._lock.acquire(settings.patience)
        try:
            if self.events_path.exists():
                self._resume(indexed, settings)
            else:
                self._start(queue, indexed, settings)
        except BaseException:
            self._lock.release()
            raise
        mode, total = self._log.header.mode, len(self.entries)
        self.state = SessionState.replay(mode, total, self._log.events)
        self._append("open", note=" ".join(self.warnings) or None)
        self._shown_at = self._clock()

    def _start(self, queue: list[Slotting], rows: dict, settings: SessionSettings) -> None:
        """Write the key, then the header that seals it."""
        self._queue, self.entries = queue, fill_queue(queue, rows)
        key = write_blind_key(self.session_id, queue)
        write_text_atomic(key_path(self.events_path), key)
        header = make_header(self.session_id, settings, self.entries, sha256_text(key))
        self._log = EventLog.create(self.events_path, header)

    def _resume(self, rows: dict, settings: SessionSettings) -> None:
        """Read the files back; the queue is the one in the key, not one drawn anew."""
        self._log = EventLog.read(self.events_path)
        found = self._log.header
        self._queue = read_sealed_key(self.events_path, found)
        self.entries = fill_queue(self._queue, rows)
        asked = make_header(self.session_id, settings, self.entries, found.blind_key_sha256)
        check_header(found, asked, self.events_path)
        self._report_torn_line()
        self._log.repair()

    def _report_torn_line(self) -> None:
        if self._log.torn_bytes:
            self.warnings.append(
                f"The last line of {self.events_path.name} was torn by a crash "
                f"({self._log.torn_bytes} bytes); that one action is lost, all before it are kept."
            )

    # --- what the view may know -----------------------------------------------------------------

    @property
    def header(self) -> Header:
        """Who grades what, as written in the first line of the file."""
        return self._log.header

    @property
    def mode(self) -> str:
        """ "single" or "ab"."""
        return self.header.mode

    @property
    def current(self) -> Entry | None:
        """The entry to grade now; None when every entry is graded or skipped."""
        cursor = self.state.cursor
        return None if cursor is None else self.entries[cursor]

    @property
    def current_state(self) -> EntryState | None:
        """What has been said about the current entry so far."""
        cursor = self.state.cursor
        return None if cursor is None else self.state.entries[cursor]

    @property
    def progress(self) -> Progress:
        """Counts of the queue and the median time per item."""
        return self.state.progress()

    @property
    def saved_events(self) -> int:
        """Events on the disk. An action that returned is among them."""
        return len(self._log.events)

    # --- actions --------------------------------------------------------------------------------

    def grade(
        self, verdict: str, sentences: Sequence[SentenceGrade] = (),
        omissions: Sequence[Omission] = (), note: str | None = None, slot: int = 1,
    ) -> None:
        """Grade the current summary as a whole: "supported", "hallucinated" or "unsure".

        Sentence grades are optional and must not contradict the verdict. In mode ab a grade does
        not end the entry; the preference does. Raises SessionError.
        """
        check_consistent(verdict, sentences)
        self._check_sentences(sentences, slot)
        action = "adjudicate" if self.header.role == "adjudicate" else "grade"
        self._act(
            action, verdict=verdict, labels=tuple(sentences), omissions=tuple(omissions),
            note=note, slot=slot,
        )

    def grade_part(
        self, sentence: SentenceGrade | None = None, omissions: Sequence[Omission] | None = None
    ) -> None:
        """Save the grade of one sentence, or what was left out; the entry stays open."""
        self._check_sentences([sentence] if sentence else [], slot=1)
        labels = (sentence,) if sentence else ()
        left_out = None if omissions is None else tuple(omissions)
        self._act("grade", labels=labels, omissions=left_out, slot=1)

    def suggest(self, shown: bool) -> None:
        """Show or hide the detector's suggestions. Whether an item was graded with them in view
        stands in its events."""
        self._check_blind()
        self._append("suggest", suggested=shown)

    def prefer(self, preference: int, note: str | None = None) -> None:
        """Mode ab: -2 (summary 1 is much better) to 2 (summary 2 is), 0 for no difference."""
        if self.mode != "ab":
            raise SessionError("This session shows one summary at a time.", "Use grade().")
        self._act("preference", preference=preference, note=note)

    def skip(self, note: str | None = None) -> None:
        """Leave the current entry ungraded; it counts as unfinished and can be gone back to."""
        self._act("skip", note=note)

    def flag(self, flagged: bool = True) -> None:
        """Mark the current entry for discussion, or take the mark off."""
        self._act("flag", flagged=flagged)

    def note(self, text: str) -> None:
        """Write a free note on the current entry; it replaces the one before."""
        self._act("note", note=text)

    def go_to(self, order_index: int) -> None:
        """Show another entry, for instance a skipped one."""
        if not 0 <= order_index < len(self.entries):
            raise SessionError(
                f"There is no entry {order_index}.", f"Give 0 to {len(self.entries) - 1}."
            )
        self._check_blind()
        self._append("open", order_index=order_index, item_id=self.entries[order_index].item_id)
        self._shown_at = self._clock()

    def undo(self) -> Event:
        """Take the last action back and return to its entry. Works across restarts, repeatedly."""
        self._check_blind()
        target = self.state.last_action
        if target is None:
            raise SessionError("There is nothing to undo.", "Grade an item first.")
        self._append(
            "undo", undo_of=target.seq, order_index=target.order_index, item_id=target.item_id
        )
        self._shown_at = self._clock()
        return target

    def unblind(self, force: bool = False) -> list[dict[int, str]]:
        """Break the seal: for each entry the system in slot 1 (and 2). Grading ends with it.

        Raises SessionError while entries are ungraded, unless `force`.
        """
        left = self.progress.unfinished
        if left and not force:
            raise SessionError(
                f"{left} of {len(self.entries)} entries are not graded yet.",
                "Grade them, or call unblind(force=True) and lose the blinding of the rest.",
            )
        if not self.state.unblinded:
            self._append("unblind", note="forced" if left else None)
        return [dict(enumerate(slotting.systems, start=1)) for slotting in self._queue]

    def close(self) -> None:
        """Give the lock back, so that another process can go on."""
        self._lock.release()

    def __enter__(self) -> AssessmentSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- writing --------------------------------------------------------------------------------

    def _act(self, action: str, **fields: Any) -> None:
        """Append an action on the current entry, with the time since it was shown."""
        self._check_blind()
        entry = self.current
        if entry is None:
            raise SessionError(
                "Every entry is graded or skipped.", "Use undo() or go_to() to change a grade."
            )
        self._append(
            action, order_index=entry.order_index, item_id=entry.item_id,
            is_repeat=entry.is_repeat, elapsed_ms=round((self._clock() - self._shown_at) * 1000),
            suggested=entry.order_index in self.state.suggested or None,
            **fields,
        )
        if self.state.cursor != entry.order_index:
            self._shown_at = self._clock()

    def _append(self, action: str, **fields: Any) -> None:
        self._lock.check()
        try:
            event = Event(seq=self.saved_events + 1, ts_utc=utc_now(), action=action, **fields)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"])
            raise SessionError(
                f"Not saved: {place}: {problem['msg']}, got {problem['input']!r}.",
                "Give one of the values named there.",
            ) from None
        self._log.append(event)
        self.state.apply(event)

    def _check_blind(self) -> None:
        if self.state.unblinded:
            raise SessionError(
                "The session has been unblinded; grades given now would not be blind.",
                "Start a new session under another name.",
            )

    def _check_sentences(self, sentences: Sequence[SentenceGrade], slot: int) -> None:
        text = self.current.summaries[slot - 1] if self.current else ""
        for grade in sentences:
            if text[grade.start : grade.end] != grade.text:
                raise SessionError(
                    f"Sentence {grade.statement_id} is not in the summary at "
                    f"{grade.start}-{grade.end}.",
                    "Take the offsets from entry.sentences().",
                )


def _plan(rows: dict[tuple[str, str], dict], settings: SessionSettings) -> list[Slotting]:
    queue = plan_queue(
        rows, SYSTEMS, settings.mode, settings.items, settings.seed, settings.assessor
    )
    return add_repeats(queue, settings.repeat_share, settings.seed)
