"""What a detector is: it returns one verdict per statement; and a judge that errs on purpose."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import prod
from typing import Literal, Protocol

Verdict = Literal["supported", "contradicted", "not_in_note", "unparsed"]


@dataclass(frozen=True)
class Source:
    """What a summary is judged against: the note's text and, where known, its fact table."""

    text: str
    facts: dict | None = None


@dataclass(frozen=True)
class StatementVerdict:
    """One statement of a summary: `summary[start:end] == text`.

    `error_type` (fabrication, negation, detail, causality, contextual, other) is None unless it is
    an error. `evidence`: what the source says on it, in words; `evidence_spans`: where, in
    `Source.text`. `score`: how unsupported it is, 0 to 1 (None: the detector says yes or no).
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
        return self.verdict in ("contradicted", "not_in_note")

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """All verdicts on one summary.

    `omissions`: what the source states and the summary leaves out. `stated`: how many such things
    the source states (0: this detector does not look for them); `stated_unit`: what they are.
    """

    statements: list[StatementVerdict]
    omissions: list[str]
    detector: str
    stated: int = 0
    stated_unit: str = "facts of the note"

    @property
    def errors(self) -> int:
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
        """How sure it is that a statement is wrong, were they independent, 0 to 1: it ranks
        summaries. None when nothing could be judged."""
        readable = [s for s in self.statements if s.verdict != "unparsed"]
        scores = [float(s.is_error) if s.score is None else s.score for s in readable]
        return 1 - prod(1 - score for score in scores) if scores else None


class Detector(Protocol):
    """Anything with a name that judges a summary against its source, statement by statement."""

    name: str

    def judge(self, source: Source, summary: str) -> Judgement: ...


@dataclass(frozen=True)
class NoisyJudge:
    """A detector that errs more, as people do: shares of supported statements called wrong and of
    wrong ones let pass. A flip depends on (seed, source, statement) alone, in whatever order."""

    detector: Detector
    false_positive_rate: float
    false_negative_rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.detector.name}+noise"

    def judge(self, source: Source, summary: str) -> Judgement:
        judged = self.detector.judge(source, summary)
        statements = [self._flip(source, statement) for statement in judged.statements]
        return replace(judged, statements=statements, detector=self.name)

    def _flip(self, source: Source, said: StatementVerdict) -> StatementVerdict:
        rate = self.false_negative_rate if said.is_error else self.false_positive_rate
        parts = "\x1f".join(map(str, (self.seed, source.text, said.text, said.start)))
        drawn = int.from_bytes(sha256(parts.encode()).digest()[:7], "big") / 2**56  # 0 to 1
        if said.verdict == "unparsed" or drawn >= rate:
            return said
        if said.is_error:
            return replace(said, verdict="supported", error_type=None, score=None)
        return replace(said, verdict="not_in_note", error_type="other", score=None)
