"""The assessment session: the one process that writes a log. It knows nothing of widgets."""

from __future__ import annotations

import json
import os
import re
import time
import unicodedata
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hallulib import files
from hallulib.assessment import queue
from hallulib.assessment.log import FINAL, ON_ITEM, Action, Log, explain, start_log, sum_up
from hallulib.errors import HallulibError, SessionError
from hallulib.recipe import Recipe
from hallulib.run import Run

SIMULATED = "simulated"
PATIENCE = 10.0  # seconds that a new kernel waits for the one before it to end
_OPEN: dict[Path, Session] = {}  # a notebook cell run again takes its own session over


class Session(AbstractContextManager):
    """One assessor's pass through one blinded queue; opened again, it is at the same item.

    Use it in a `with` block or call `close()`; the lock of a process that died is free.
    `warning` says what was noticed on opening, as a line torn by a crash.
    """

    def __init__(
        self, folder: Path, rows: queue.Rows, places: list[queue.Place], header: dict[str, Any]
    ) -> None:
        """Start the session, or go on with it in the order of its key. Another header, other items
        or another guideline are another session: grades are not mixed."""
        header = header | {
            "items_sha256": queue.hash_items(queue.fill_queue(places, rows)),
            "guideline_sha256": files.sha256_text(read_guideline()),
        }
        self.path, self.warning = folder.resolve() / _make_name(header), ""
        self._lock = _take_lock(self.path)
        _OPEN[self.path] = self
        try:
            if not self.path.exists():
                start_log(self.path, header | {"created": _tell_time()}, places)
            self.log, self._shown = Log(self.path), time.monotonic()
            self.header, self.items = self.log.header, queue.fill_queue(self.log.queue, rows)
            self._mend()
        except BaseException:
            self.close()
            raise

    @property
    def current(self) -> queue.Item | None:
        """The item to grade now; None when every item is graded or skipped."""
        return None if self.log.cursor is None else self.items[self.log.cursor]

    @property
    def said(self) -> dict[str, Any]:
        """What has been said of it so far, as `sum_up` gives it; of no item, nothing."""
        return sum_up([]) if self.current is None else self.log.items[self.log.cursor]

    def act(self, do: str, **values: Any) -> None:
        """Take one action on the item that is shown: label, grade, prefer, omit, skip, flag, note;
        or suggest (show the detector's opinion: `on`), show (go to `place`). It is on the disk on
        return. Raises SessionError, with nothing written, for what makes no sense."""
        self._check_open()
        if do in ON_ITEM:
            self._check_item(do, values)
            values |= {"place": self.log.cursor, "suggested": self.log.cursor in self.log.seen}
            values["seconds"] = round(time.monotonic() - self._shown, 1) if do in FINAL else None
        self._write(do, **values)

    def undo(self) -> Action:
        """Take the last action back and return to its item. Works across restarts, repeatedly."""
        self._check_open()
        last = self.log.standing[-1:]
        self._write("undo")
        return last[0]

    def unblind(self) -> list[dict[int, str]]:
        """Break the seal: for each item the system of summary 1 (and 2). Grading ends with it.
        Raises SessionError while items are ungraded."""
        left = len(self.items) - self.log.progress()["graded"]
        if left:
            why = f"{left} of {len(self.items)} items are not graded yet."
            raise SessionError(why, "Grade them, the skipped too; the analysis needs no open seal.")
        if not self.log.unblinded:
            self._check_open()
            self._write("unblind")
        return [dict(enumerate(place["systems"], start=1)) for place in self.log.queue]

    def close(self) -> None:
        """Give the lock back, so that another process can go on."""
        self._lock.release()
        if _OPEN.get(self.path) is self:
            del _OPEN[self.path]

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, do: str, **values: Any) -> None:
        """Put an action on the disk, then into the log; what fails leaves both as they were."""
        size, before = self.path.stat().st_size, self.log.cursor
        try:
            action = Action(n=len(self.log.actions) + 1, at=_tell_time(), do=do, **values)
            self.log.check(action)
            with files.storage_guard(self.path), open(self.path, "a", encoding="utf-8") as file:
                files.append_lines(file, [action.model_dump(exclude_defaults=True)])
        except ValueError as error:  # a value that is none, half an emoji
            why = f"Not saved: {explain(error)}."
            raise SessionError(why, "Nothing has changed; do something else.") from None
        except (OSError, HallulibError):
            os.truncate(self.path, size)
            raise
        self.log.take(action)
        if self.log.cursor != before:
            self._shown = time.monotonic()

    def _mend(self) -> None:
        """Cut a torn line off, so that the next action begins on a line of its own."""
        data = self.path.read_bytes()
        whole = data[: len(data) - self.log.torn].removesuffix(b"\n") + b"\n"
        if whole != data:
            files.write_text_atomic(self.path, whole.decode())
        if self.log.torn:
            self.warning = (
                f"The last line of {self.path.name} was torn by a crash ({self.log.torn} bytes); "
                "that one action is lost, all before it are kept."
            )
            self._write("torn", text=self.warning)

    def _check_open(self) -> None:
        if not self._lock.is_locked:
            why = "The session was closed, or opened again elsewhere; this view no longer writes."
            raise SessionError(why, "Go on in the newer view, or run this cell again.")
        if self.log.unblinded:
            why = "The session has been unblinded; grades given now would not be blind."
            raise SessionError(why, "Start another, with another seed or as another assessor.")

    def _check_item(self, do: str, values: dict[str, Any]) -> None:
        """Whether the action fits this session and the item that is shown."""
        if self.current is None:
            raise SessionError("Every item is graded or skipped.", "Undo, or show one again.")
        mode = {"prefer": "ab", "label": "single", "grade": "single", "omit": "single"}.get(do)
        if mode not in (None, self.header["mode"]):
            why = f"A session of mode '{self.header['mode']}' has no '{do}'."
            raise SessionError(why, "See the guideline.")
        known = [sentence.sid for sentence in self.current.sentences]
        if do == "label" and values.get("sentence") not in known:
            raise SessionError("The summary has no such sentence.", f"It has {', '.join(known)}.")
        wrong = any(label["verdict"] == "hallucinated" for label in self.said["labels"].values())
        if do == "grade" and values.get("verdict") == "supported" and wrong:
            why = "A summary with a hallucinated sentence cannot be 'supported'."
            raise SessionError(why, "Grade it 'hallucinated', or correct the sentence.")


def open_session(run: Run, recipe: Recipe, assessor: str = "") -> Session:
    """Start or continue the session of `assessor` (default: the recipe's) on this run's summaries.
    An assessor whose name begins with "simulated" is recorded as such. Raises MissingArtifact
    before notebook 06, SessionError when the session is open elsewhere."""
    chosen, rows, seed = recipe.assessment, read_generations(run), recipe.seed
    header = make_header(assessor or chosen.assessor, seed, chosen.mode)
    places = queue.plan_queue(rows, chosen.mode, chosen.items, seed, header["assessor_id"])
    places = queue.add_repeats(places, chosen.repeat_share, seed)
    return Session(run.path("assessment"), rows, places, header)


def make_header(assessor: str, seed: int, mode: str = "single", role: str = "assess") -> dict:
    """Who grades what. Roles: assess, adjudicate, practice. `assessor_id` says whom a name means:
    "Dana", "dana " and accents composed or not are one."""
    name = unicodedata.normalize("NFC", " ".join(assessor.split()))
    who = unicodedata.normalize("NFC", name.casefold())
    kind = SIMULATED if who.startswith(SIMULATED) else "human"
    about = {"assessor": name, "assessor_id": who, "assessor_kind": kind}
    return about | {"seed": seed, "mode": mode, "role": role}


def read_generations(run: Run) -> queue.Rows:
    """The summaries that the evaluation of this run generated, by (item id, system)."""
    rows = files.read_jsonl(run.require("evaluation/generations.jsonl"))
    return {(str(row["id"]), row["system"]): row for row in rows}


def read_guideline() -> str:
    """The page (Markdown) that tells an assessor what counts as what; its hash is in the header."""
    return Path(__file__).with_name("guideline.md").read_text("utf-8")


def _make_name(header: dict[str, Any]) -> str:
    """A file name of letters that any file system takes; who is meant is in the hash."""
    slug = re.sub(r"[^a-z0-9]+", "-", header["assessor_id"]).strip("-")[:40] or "assessor"
    kind = header["mode"] if header["role"] == "assess" else header["role"]
    decides = json.dumps({**header, "assessor": ""}, sort_keys=True)
    return f"{slug}-{kind}-{files.sha256_text(decides)[:8]}.events.jsonl"


def _tell_time() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _take_lock(path: Path) -> FileLock:
    """The lock of an event file; from an older view in this process it is taken over."""
    if path in _OPEN:
        _OPEN[path].close()
    # a kernel answers its widgets in threads of its own
    lock = FileLock(path.with_suffix(".lock"), timeout=PATIENCE, thread_local=False)
    with files.storage_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return lock.acquire().lock
        except Timeout:
            why = f"The session of {files.display_path(path)} is open in another process."
            raise SessionError(why, "Close it there: shut that notebook's kernel down.") from None
