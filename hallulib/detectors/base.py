"""What a detector is: it reads a source and a summary and returns one verdict per statement."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Literal, Protocol, get_args

Verdict = Literal["supported", "contradicted", "not_in_note", "unparsed"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
ERROR_VERDICTS = ("contradicted", "not_in_note")


@dataclass(frozen=True)
class Source:
    """What a summary is judged against: the note's text and, where known, its fact table."""

    text: str
    facts: dict | None = None


@dataclass(frozen=True)
class StatementVerdict:
    """One statement of a summary: `summary[start:end] == text`.

    `error_type` follows the taxonomy (fabrication, negation, detail, causality, contextual,
    other) and is None unless the verdict is an error. `evidence` is what the source says on it, in
    words; `evidence_spans` are the places (start, end) of `Source.text` where it says so. `score`
    is how unsupported the statement is, from 0 to 1 (None: this detector only says yes or no).
    """

    text: str
    start: int
    end: int
    kind: str
    verdict: Verdict
    error_type: str | None = None
    evidence: str = ""
    evidence_spans: tuple[tuple[int, int], ...] = ()
    score: float | None = None

    @property
    def is_error(self) -> bool:
        return self.verdict in ERROR_VERDICTS

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> StatementVerdict:
        spans = tuple(tuple(span) for span in values.get("evidence_spans", ()))
        return cls(**values | {"evidence_spans": spans})


@dataclass(frozen=True)
class Judgement:
    """All verdicts on one summary.

    `omissions` names what the source states and the summary leaves out; `stated` is how many such
    things the source states (0: this detector does not look for omissions), `stated_unit` what
    they are.
    """

    statements: list[StatementVerdict]
    omissions: list[str]
    detector: str
    stated: int = 0
    stated_unit: str = "facts of the note"

    @property
    def errors(self) -> int:
        """Number of statements that are contradicted or not in the note."""
        return sum(statement.is_error for statement in self.statements)

    @property
    def unparsed(self) -> int:
        """Number of sentences this detector could not read; they are counted, never dropped."""
        return sum(statement.verdict == "unparsed" for statement in self.statements)

    @property
    def answered(self) -> bool:
        """Whether at least one statement could be read."""
        return len(self.statements) > self.unparsed

    @property
    def hallucinated(self) -> bool | None:
        """True with at least one error; None (not False) when nothing could be judged."""
        return self.errors > 0 if self.answered else None

    @property
    def score(self) -> float | None:
        """How sure it is that a statement is wrong, 0 to 1: one minus the chance that none is, were
        they independent. It ranks summaries; None when nothing could be judged."""
        if not self.answered:
            return None
        readable = [s for s in self.statements if s.verdict != "unparsed"]
        scores = [float(s.is_error) if s.score is None else s.score for s in readable]
        return 1 - prod(1 - score for score in scores)


class Detector(Protocol):
    """Anything with a name that judges a summary against its source."""

    name: str

    def judge(self, source: Source, summary: str) -> Judgement:
        """Return one verdict per statement of `summary`."""
        ...
