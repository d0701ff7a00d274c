"""The exact detector: holds a summary against the fact table of a clinic note."""

from __future__ import annotations

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
        statements = [_to_verdict(found) for found in check(source.facts, summary)]
        return Judgement(
            statements,
            find_omissions(source.facts, summary),
            self.name,
            stated=sum(kind in source.facts for kind in KINDS),
        )


def _to_verdict(found: dict) -> StatementVerdict:
    # A sentence that states no known fact is neither right nor wrong: it is unparsed.
    if found["kind"] == "unparsed":
        found = found | {"verdict": "unparsed", "error_type": None}
    return StatementVerdict.from_dict(found)
