"""The assessment session: what a log of actions adds up to, and the one process that writes it.

It knows nothing of widgets. Every action is on the disk before `act` returns; opened again, the
session is at the same item.
"""

from __future__ import annotations

import json
import re
import time
import unicodedata
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hallulib.assessment.log import FINAL, ON_ITEM, Action, ItemState, Log, State
from hallulib.assessment.queue import (
    Item,
    Place,
    Rows,
    add_repeats,
    fill_queue,
    hash_items,
    plan_queue,
)
from hallulib.errors import SessionError
from hallulib.files import display_path, read_jsonl, sha256_text, storage_guard
from hallulib.recipe import Recipe
from hallulib.run import Run

GENERATIONS = "evaluation/generations.jsonl"
SIMULATED = "simulated"
PATIENCE = 10.0  # seconds that a new kernel waits for the one before it to end
_OPEN: dict[Path, Session] = {}  # a notebook cell run again takes its own session over


class Session(AbstractContextManager):
    """One assessor's pass through one blinded queue, kept in `<folder>/<name>.events.jsonl`.

    Use it in a `with` block or call `close()`; the lock of a process that died is free.
    `warning` says what was noticed on opening, as a line torn by a crash.
    """

    def __init__(self, folder: Path, rows: Rows, queue: list[Place], header: dict[str, Any]):
        """Start the session, or go on with it in the order of its key. Another header, other items
        or another guideline are another session: grades are not mixed."""
        header = header | {
            "items_sha256": hash_items(fill_queue(queue, rows)),
            "guideline_sha256": sha256_text(read_guideline()),
        }
        self.path = folder.resolve() / f"{_make_name(header)}.events.jsonl"
        self._lock, self.warning = _take_lock(self.path), ""
        _OPEN[self.path] = self
        try:
            if not self.path.exists():
                Log.start(self.path, header, queue)
            self.log = Log.read(self.path)
            self.header, self.items = self.log.header, fill_queue(self.log.queue, rows)
            self.state, self._shown = State.replay(self.log), time.monotonic()
            self._repair()
        except BaseException:
            self.close()
            raise

    @property
    def current(self) -> Item | None:
        """The item to grade now; None when every item is graded or skipped."""
        return None if self.state.cursor is None else self.items[self.state.cursor]

    @property
    def current_state(self) -> ItemState:
        """What has been said of it so far; of no item, nothing."""
        return ItemState() if self.current is None else self.state.items[self.state.cursor]

    def act(self, do: str, **values: Any) -> None:
        """Take one action on the item that is shown: label, grade, prefer, omit, skip, flag, note;
        or suggest (show the detector's opinion: `on`), show (go to `place`).

        Raises SessionError, with nothing written, for what makes no sense or cannot be saved.
        """
        self._check_open()
        if do in ON_ITEM:
            self._check_item(do, values)
            place = self.state.cursor
            values |= {"place": place, "suggested": place in self.state.seen or None}
            values["seconds"] = round(time.monotonic() - self._shown, 1) if do in FINAL else None
        elif do == "show" and values.get("place") not in range(len(self.items)):
            raise SessionError("There is no such item.", f"Give 0 to {len(self.items) - 1}.")
        self._append(do, **values)

    def undo(self) -> Action:
        """Take the last action back and return to its item. Works across restarts, repeatedly."""
        self._check_open()
        if not self.state.standing:
            raise SessionError("There is nothing to undo.", "Grade an item first.")
        last = self.state.standing[-1]
        self._append("undo", place=last.place)
        return last

    def unblind(self) -> list[dict[int, str]]:
        """Break the seal: for each item the system of summary 1 (and 2). Grading ends with it.

        Raises SessionError while items are ungraded.
        """
        left = sum(not state.done for state in self.state.items)
        if left:
            raise SessionError(
                f"{left} of {len(self.items)} items are not graded yet.",
                "Grade them (also the skipped ones); the analysis needs no open seal.",
            )
        if not self.state.unblinded:
            self._check_open()
            self._append("unblind")
        return [dict(enumerate(line["systems"], start=1)) for line in self.log.queue]

    def close(self) -> None:
        """Give the lock back, so that another process can go on."""
        self._lock.release()
        if _OPEN.get(self.path) is self:
            del _OPEN[self.path]

    def __exit__(self, *error: object) -> None:
        self.close()

    def _append(self, do: str, **values: Any) -> None:
        before = self.state.cursor
        self.state.apply(self.log.append(do, **values))
        if self.state.cursor != before:
            self._shown = time.monotonic()

    def _repair(self) -> None:
        self.log.repair()
        if self.log.torn:
            self.warning = (
                f"The last line of {self.path.name} was torn by a crash ({self.log.torn} bytes); "
                "that one action is lost, all before it are kept."
            )
            self._append("torn", text=self.warning)

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            raise SessionError(
                "The session has been closed, or opened again elsewhere, so this view of it no "
                "longer writes.",
                "Go on in the newer view, or run this notebook cell again; nothing saved is lost.",
            )
        if self.state.unblinded:
            raise SessionError(
                "The session has been unblinded; grades given now would not be blind.",
                "Start another session: with another seed, or as another assessor.",
            )

    def _check_item(self, do: str, values: dict[str, Any]) -> None:
        """Whether the action fits this session and the item that is shown."""
        if self.current is None:
            raise SessionError("Every item is graded or skipped.", "Undo, or show one again.")
        other = {"prefer": "single", "label": "ab", "grade": "ab", "omit": "ab"}.get(do)
        if other == self.header["mode"]:
            raise SessionError(f"A session of mode '{other}' has no '{do}'.", "See the guideline.")
        known = [sentence.sid for sentence in self.current.sentences]
        if do == "label" and values.get("sentence") not in known:
            raise SessionError("The summary has no such sentence.", f"It has {', '.join(known)}.")
        labels = self.current_state.labels.values()
        wrong = any(label.verdict == "hallucinated" for label in labels)
        if do == "grade" and values.get("verdict") == "supported" and wrong:
            raise SessionError(
                "A summary with a hallucinated sentence cannot be 'supported'.",
                "Grade it 'hallucinated', or correct the sentence.",
            )


def open_session(run: Run, recipe: Recipe, assessor: str = "") -> Session:
    """Start or continue the session of `assessor` (default: the recipe's) on this run's summaries.

    An assessor whose name begins with "simulated" is recorded as such. Raises MissingArtifact
    before notebook 06, SessionError when the session is open elsewhere.
    """
    chosen, rows, seed = recipe.assessment, read_generations(run), recipe.seed
    header = make_header(assessor or chosen.assessor, seed, chosen.mode)
    queue = plan_queue(rows, chosen.mode, chosen.items, seed, header["assessor_id"])
    queue = add_repeats(queue, chosen.repeat_share, seed)
    return Session(run.path("assessment"), rows, queue, header)


def make_header(assessor: str, seed: int, mode: str = "single", role: str = "assess") -> dict:
    """Who grades what. Roles: assess, adjudicate, practice.

    `assessor_id` says whom a name means: "Dana", "dana " and accents composed or not are one.
    """
    name = unicodedata.normalize("NFC", " ".join(assessor.split()))
    who = unicodedata.normalize("NFC", name.casefold())
    kind = SIMULATED if who.startswith(SIMULATED) else "human"
    return {
        "assessor": name, "assessor_id": who, "assessor_kind": kind, "seed": seed, "mode": mode,
        "role": role,
    }  # fmt: skip


def read_generations(run: Run) -> Rows:
    """The summaries that the evaluation of this run generated, by (item id, system)."""
    rows = read_jsonl(run.require(GENERATIONS))
    return {(str(row["id"]), row["system"]): row for row in rows}


def read_guideline() -> str:
    """The page (Markdown) that tells an assessor what counts as what; its hash is in the header."""
    return Path(__file__).with_name("guideline.md").read_text("utf-8")


def _make_name(header: dict[str, Any]) -> str:
    """A name of letters that any file system takes; who is meant is in the hash."""
    slug = re.sub(r"[^a-z0-9]+", "-", header["assessor_id"]).strip("-")[:40] or "assessor"
    kind = header["mode"] if header["role"] == "assess" else header["role"]
    decides = {name: value for name, value in header.items() if name != "assessor"}
    return f"{slug}-{kind}-{sha256_text(json.dumps(decides, sort_keys=True))[:8]}"


def _take_lock(path: Path) -> FileLock:
    """The lock of an event file; from an older view in this process it is taken over."""
    if path in _OPEN:
        _OPEN[path].close()
    with storage_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # a kernel answers its widgets in threads of its own
        lock = FileLock(path.with_suffix(".lock"), timeout=PATIENCE, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise SessionError(
                f"The session of {display_path(path)} is open in another process.",
                "Close it there: shut that notebook's kernel down.",
            ) from None
    return lock
