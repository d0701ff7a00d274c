"""A judge with stated error rates on top of its own."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

from hallulib.detectors.base import Detector, Judgement, Source, StatementVerdict
from hallulib.errors import RecipeError


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
        self.detector = detector
        self.false_positive_rate = false_positive_rate
        self.false_negative_rate = false_negative_rate
        self.seed = seed
        self.name = f"{detector.name}+noise"

    def judge(self, source: Source, summary: str) -> Judgement:
        judged = self.detector.judge(source, summary)
        statements = [self._flip(source, statement) for statement in judged.statements]
        return replace(judged, statements=statements, detector=self.name)

    def _flip(self, source: Source, statement: StatementVerdict) -> StatementVerdict:
        if statement.verdict == "unparsed":
            return statement
        rate = self.false_negative_rate if statement.is_error else self.false_positive_rate
        if draw_uniform(self.seed, source.text, statement.text, statement.start) >= rate:
            return statement
        if statement.is_error:
            return replace(statement, verdict="supported", error_type=None, score=None)
        return replace(statement, verdict="not_in_note", error_type="other", score=None)


def draw_uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on its arguments only (sha256), on every machine."""
    digest = sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
