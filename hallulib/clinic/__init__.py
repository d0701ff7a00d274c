"""The built-in clinic world: notes whose facts are known, so hallucination is measured exactly."""

from hallulib.clinic.facts import check, find_omissions
from hallulib.clinic.notes import KINDS, Note, make_notes
from hallulib.clinic.summaries import exchange_fact, write_reference, write_summary
from hallulib.clinic.words import HELD_OUT_STYLE, SEEN_STYLES

__all__ = [
    "HELD_OUT_STYLE", "KINDS", "SEEN_STYLES", "Note", "check", "exchange_fact", "find_omissions",
    "make_notes", "write_reference", "write_summary",
]  # fmt: skip
