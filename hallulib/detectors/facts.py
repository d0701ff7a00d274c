"""The exact detector: holds a summary against the fact table of a clinic note."""

from __future__ import annotations

import re

from hallulib.clinic.facts import check, find_omissions
from hallulib.clinic.notes import KINDS
from hallulib.detectors.base import Judgement, Source, StatementVerdict
from hallulib.errors import DataError


class FactsDetector:
    """Wraps :func:`hallulib.clinic.facts.check`. It needs `Source.facts`, so only the clinic world
    (or a source that brings such a table) can be judged with it. Raises DataError without one."""

    name = "facts"

    def judge(self, source: Source, summary: str) -> Judgement:
        if not source.facts:
            raise DataError(
                "the exact detector needs a fact table, and this row has none",
                "use data.source clinic, or evaluation.detector entities for other text",
            )
        statements = [_read_verdict(found, source) for found in check(source.facts, summary)]
        omissions = find_omissions(source.facts, summary)
        stated = sum(kind in source.facts for kind in KINDS)
        return Judgement(statements, omissions, self.name, stated)


def _read_verdict(found: dict, source: Source) -> StatementVerdict:
    # A sentence that states no known fact is neither right nor wrong: it is unparsed.
    if found["kind"] == "unparsed":
        found = found | {"verdict": "unparsed", "error_type": None}
    places = [_find_value(source.text, value) for value in source.facts.get(found["kind"], [])]
    return StatementVerdict(**found, evidence_spans=tuple(filter(None, places)))


def _find_value(text: str, value: str) -> tuple[int, int] | None:
    """Where the note words a fact as the fact table does; None where it words it otherwise."""
    match = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE)
    return match.span() if match else None
