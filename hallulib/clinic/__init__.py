"""The built-in clinic world: notes whose facts are known, so hallucination is measured exactly."""

from hallulib.clinic.facts import check, find_omissions
from hallulib.clinic.notes import HELD_OUT_STYLE, KINDS, SEEN_STYLES, Note, make_notes
from hallulib.clinic.summaries import exchange_fact, write_reference, write_summary

__all__ = [
    "HELD_OUT_STYLE", "KINDS", "SEEN_STYLES", "Note", "check", "exchange_fact", "find_omissions",
    "make_notes", "write_reference", "write_summary",
]  # fmt: skip
