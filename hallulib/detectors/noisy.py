"""A judge with stated error rates, and how good any judge is against a better one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256

from hallulib.detectors.base import Detector, Judgement, Source, StatementVerdict
from hallulib.errors import DataError, ParameterError
from hallulib.evaluation.statistics import estimate_proportion


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
                raise ParameterError(
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


def measure_judge(
    detector: Detector,
    rows: Iterable[tuple[Source, str]],
    truth_detector: Detector,
    unit: str = "statement",
) -> dict:
    """Hold a detector against a better one on (source, summary) rows; "positive" = hallucinated.

    unit "statement": each statement of the truth, matched by overlapping text; it is called wrong
    if any statement of the judge that overlaps it is wrong. unit "summary": the whole summary.
    Returns {unit, n, tp, fp, tn, fn, unmatched, sensitivity, specificity, detector, truth}; the
    two rates are dicts with value, low and high (Wilson 95 %), or None where their n is 0.
    Raises DataError when there is nothing to compare.
    """
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    unmatched = 0
    for source, summary in rows:
        judged = detector.judge(source, summary)
        truth = truth_detector.judge(source, summary)
        for wrong, called in _pair_verdicts(judged, truth, unit):
            if wrong is None or called is None:
                unmatched += 1
            else:
                counts[wrong, called] += 1
    if not sum(counts.values()):
        raise DataError(
            "the judge was not compared with anything: no row gave a verdict by both detectors",
            "pass rows with non-empty summaries",
        )
    tp, fn = counts[True, True], counts[True, False]
    fp, tn = counts[False, True], counts[False, False]
    return {
        "unit": unit, "n": tp + fn + fp + tn, "tp": tp, "fp": fp, "tn": tn, "fn": fn,
        "unmatched": unmatched, "detector": detector.name, "truth": truth_detector.name,
        "sensitivity": estimate_proportion(tp, tp + fn, unit).to_dict() if tp + fn else None,
        "specificity": estimate_proportion(tn, tn + fp, unit).to_dict() if tn + fp else None,
    }  # fmt: skip


def _pair_verdicts(
    judged: Judgement, truth: Judgement, unit: str
) -> list[tuple[bool | None, bool | None]]:
    """Return (is wrong, was called wrong) per unit; None where one side has no verdict."""
    if unit == "summary":
        return [(truth.hallucinated, judged.hallucinated)]
    pairs: list[tuple[bool | None, bool | None]] = []
    for true in truth.statements:
        over = [s for s in judged.statements if s.start < true.end and true.start < s.end]
        readable = [s for s in over if s.verdict != "unparsed"]
        wrong = None if true.verdict == "unparsed" else true.is_error
        pairs.append((wrong, any(s.is_error for s in readable) if readable else None))
    return pairs
