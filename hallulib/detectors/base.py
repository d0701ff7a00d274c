"""What a detector is: it returns one verdict per statement; and a judge that errs on purpose."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import prod
from typing import Literal, Protocol

from hallulib.errors import RecipeError

Verdict = Literal["supported", "contradicted", "not_in_note", "unparsed"]
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


class NoisyJudge:
    """Flips a detector's verdicts per statement, as a human or model judge errs.

    false_positive_rate: share of supported statements it calls not in the note.
    false_negative_rate: share of wrong statements it lets pass. Both come on top of the wrapped
    detector's own errors. A flip depends only on (seed, source, statement), so judging twice gives
    the same answer whatever the order.
    """

    def __init__(
        self,
        detector: Detector,
        false_positive_rate: float,
        false_negative_rate: float,
        seed: int = 0,
    ) -> None:
        for rate in (false_positive_rate, false_negative_rate):
            if not 0 <= rate < 1:
                raise RecipeError(
                    f"an error rate of a judge is {rate}", "give a share from 0 up to 1 (0.05)"
                )
        self.detector, self.seed = detector, seed
        self.false_positive_rate = false_positive_rate
        self.false_negative_rate = false_negative_rate
        self.name = f"{detector.name}+noise"

    def judge(self, source: Source, summary: str) -> Judgement:
        judged = self.detector.judge(source, summary)
        statements = [self._flip(source, statement) for statement in judged.statements]
        return replace(judged, statements=statements, detector=self.name)

    def _flip(self, source: Source, said: StatementVerdict) -> StatementVerdict:
        rate = self.false_negative_rate if said.is_error else self.false_positive_rate
        drawn = _draw_uniform(self.seed, source.text, said.text, said.start)
        if said.verdict == "unparsed" or drawn >= rate:
            return said
        if said.is_error:
            return replace(said, verdict="supported", error_type=None, score=None)
        return replace(said, verdict="not_in_note", error_type="other", score=None)


def _draw_uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on its arguments only (sha256), on every machine."""
    digest = sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
