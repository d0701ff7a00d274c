"""What a session needs before its first event: settings, a name, a header, the blind key."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from hallulib.assessment.events import SIMULATED, Header, utc_now
from hallulib.assessment.queue import Entry, Slotting, hash_entries, read_blind_key
from hallulib.errors import SessionError
from hallulib.files import display_path, sha256_text

SYSTEMS = ("sft", "dpo")


@dataclass(frozen=True)
class SessionSettings:
    """What decides a session. `name` "" derives one from the assessor, the mode and the items, so
    that summaries generated anew get a session of their own. `patience`: seconds to wait for a
    process that has the session open."""

    assessor: str
    mode: str = "single"
    items: int = 20
    repeat_share: float = 0.1
    seed: int = 0
    name: str = ""
    role: str = "assess"
    patience: float = 0.0


def read_generations(path: Path) -> list[dict]:
    """The rows of evaluation/generations.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def read_guideline() -> str:
    """The page (Markdown) that tells an assessor what counts as what; its hash is in the header."""
    return Path(__file__).with_name("guideline.md").read_text("utf-8")


def default_name(settings: SessionSettings, entries: list[Entry]) -> str:
    """Other items, or another guideline, are another session: grades are not mixed."""
    assessor = re.sub(r"[^A-Za-z0-9]+", "-", settings.assessor).strip("-").lower() or "assessor"
    kind = settings.mode if settings.role == "assess" else settings.role
    return f"{assessor}-{kind}-{sha256_text(hash_entries(entries) + read_guideline())[:8]}"


def check_name(name: str) -> None:
    """A session name becomes a file name, so it must not lead out of the folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
        raise SessionError(
            f"{name!r} is not a session name.", "Use letters, digits, '-' and '_', at most 100."
        )


def make_header(
    session_id: str, settings: SessionSettings, entries: list[Entry], key_sha256: str
) -> Header:
    return Header(
        session_id=session_id,
        assessor_id=settings.assessor,
        assessor_kind=SIMULATED if settings.assessor.startswith(SIMULATED) else "human",
        created_utc=utc_now(),
        seed=settings.seed,
        items_sha256=hash_entries(entries),
        blind_key_sha256=key_sha256,
        guideline_sha256=sha256_text(read_guideline()),
        mode=settings.mode,
        role=settings.role,
        items=settings.items,
        repeat_share=settings.repeat_share,
    )


def check_header(found: Header, expected: Header, path: Path) -> None:
    """Raises SessionError naming the first field in which file and request differ."""
    for name in Header.model_fields:
        if name != "created_utc" and getattr(found, name) != getattr(expected, name):
            raise SessionError(
                f"{display_path(path)} cannot be continued: its {name} is "
                f"{getattr(found, name)!r}, now it would be {getattr(expected, name)!r}.",
                "Start a new session under another name; the grades in this file stay.",
            )


def key_path(events_path: Path) -> Path:
    """The blind key that belongs to an event file."""
    return events_path.with_name(events_path.name.replace(".events.jsonl", ".blind_key.json"))


def read_sealed_key(events_path: Path, header: Header) -> list[Slotting]:
    """The queue in the blind key. Raises SessionError unless its hash is the one in the header."""
    path = key_path(events_path)
    text = path.read_text("utf-8") if path.exists() else ""
    if sha256_text(text) != header.blind_key_sha256:
        state = "not the one the session was sealed with" if text else "missing"
        raise SessionError(
            f"The blind key {display_path(path)} is {state}; without it no grade has a system.",
            "Put the key back, or start a new session under another name.",
        )
    return read_blind_key(text)
