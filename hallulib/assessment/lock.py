"""A lock file: one process writes a session. A lock whose process is gone is taken over."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil

from hallulib.errors import SessionError
from hallulib.files import display_path, storage_guard


class SessionLock:
    """Held from `acquire` to `release`; `check` finds out whether it is still ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = secrets.token_hex(8)

    def acquire(self, patience: float = 0.0) -> None:
        """Take the lock, waiting up to `patience` seconds for a process that is just ending (a page
        loaded anew has a new kernel). Raises SessionError while another living process holds it.

        A lock of this very process is taken over too: re-running a notebook cell opens the session
        again, and the object of the earlier run then refuses to write.
        """
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                return self._acquire()
            except SessionError:
                time.sleep(0.2)
        self._acquire()

    def _acquire(self) -> None:
        process = psutil.Process()
        owner = {
            "token": self._token,
            "pid": process.pid,
            "started": process.create_time(),
            "host": socket.gethostname(),
        }
        with storage_guard(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(2):
                try:
                    handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                except FileExistsError:
                    self._remove_stale()
                    continue
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(owner, file)
                return
        raise self._in_use("another process")

    def check(self) -> None:
        """Raises SessionError when the session has since been opened elsewhere."""
        if self._read().get("token") != self._token:
            raise SessionError(
                f"The session of {display_path(self.path)} has been opened again elsewhere, "
                "so this view of it no longer writes.",
                "Go on in the newer view, or run this notebook cell again; nothing saved is lost.",
            )

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        if self._read().get("token") == self._token:
            with suppress(OSError):
                self.path.unlink()

    def _read(self) -> dict:
        try:
            return json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}

    def _remove_stale(self) -> None:
        owner = self._read()
        if owner and not _is_gone(owner):
            raise self._in_use(f"process {owner['pid']} on {owner['host']}")
        with suppress(FileNotFoundError):
            self.path.unlink()

    def _in_use(self, who: str) -> SessionError:
        return SessionError(
            f"The session of {display_path(self.path)} is open in {who}.",
            "Close it there (shut that notebook's kernel down), or open a session of another name. "
            "If that process no longer exists, delete the lock file.",
        )


def _is_gone(owner: dict) -> bool:
    """Whether the owner has ended, or is this process. A process elsewhere counts as alive."""
    if owner.get("host") != socket.gethostname():
        return False
    if owner["pid"] == os.getpid():
        return True
    try:
        started = psutil.Process(owner["pid"]).create_time()
    except psutil.NoSuchProcess:
        return True
    return abs(started - owner["started"]) > 1.0  # the number was given to a newer process
