"""How good a detector is: against a better one, or against people. "Positive" = hallucinated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef, roc_auc_score

from hallulib.detectors.base import Detector, Judgement, Source
from hallulib.errors import DataError
from hallulib.rates import rate

RESAMPLES = 300


@dataclass(frozen=True)
class Case:
    """A text of which people have said whether it is hallucinated against its source.

    `group` is the document it belongs to (intervals resample groups); `kind` is its error type.
    """

    source: Source
    text: str
    hallucinated: bool
    group: str
    kind: str = ""


@dataclass(frozen=True)
class Call:
    """One unit: is it wrong, was it called wrong (None: one side could not read it), how surely."""

    wrong: bool | None
    called: bool | None
    score: float | None
    group: str


def measure_detector(detector: Detector, cases: Iterable[Case], unit: str) -> dict[str, Any]:
    """Hold a detector against people's labels; figures as in `summarise_calls`."""
    calls = []
    for case in cases:
        judged = detector.judge(case.source, case.text)
        calls.append(Call(case.hallucinated, judged.hallucinated, judged.score, case.group))
    return summarise_calls(calls, unit) | {"detector": detector.name, "truth": "people"}


def measure_judge(
    detector: Detector,
    rows: Iterable[tuple[Source, str]],
    truth_detector: Detector,
    unit: str = "statement",
) -> dict[str, Any]:
    """Hold a detector against a better one on (source, summary) rows; see `summarise_calls`.

    unit "statement": each statement of the truth, matched by overlapping text; it is called wrong
    if any statement of the judge that overlaps it is wrong. unit "summary": the whole summary.
    """
    calls: list[Call] = []
    for source, summary in rows:
        judged = detector.judge(source, summary)
        truth = truth_detector.judge(source, summary)
        calls += _pair_verdicts(judged, truth, unit, source.text)
    names = {"detector": detector.name, "truth": truth_detector.name}
    return summarise_calls(calls, unit) | names


def _pair_verdicts(judged: Judgement, truth: Judgement, unit: str, group: str) -> list[Call]:
    if unit == "summary":
        return [Call(truth.hallucinated, judged.hallucinated, judged.score, group)]
    calls = []
    for true in truth.statements:
        over = [s for s in judged.statements if s.start < true.end and true.start < s.end]
        part = Judgement(over, [], judged.detector)
        wrong = None if true.verdict == "unparsed" else true.is_error
        calls.append(Call(wrong, part.hallucinated, part.score, group))
    return calls


def summarise_calls(calls: Sequence[Call], unit: str, seed: int = 0) -> dict[str, Any]:
    """Figures of a detector: {unit, n, tp, fp, tn, fn, unmatched, and the rates}.

    sensitivity, specificity (Wilson), balanced_accuracy, mcc and auroc (bootstrap over groups) are
    dicts with value, low and high; None where they are not defined, as without a positive.
    unmatched: units that one side could not read; they are counted, and in no rate. Raises
    DataError when there is nothing to compare.
    """
    read = [c for c in calls if c.wrong is not None and c.called is not None]
    if not read:
        raise DataError(
            "the judge was not compared with anything: no row gave a verdict by both detectors",
            "pass rows with non-empty summaries",
        )
    pairs = [(c.wrong, c.called) for c in read]
    tp, fn = pairs.count((True, True)), pairs.count((True, False))
    fp, tn = pairs.count((False, True)), pairs.count((False, False))
    return {
        "unit": unit, "n": len(read), "tp": tp, "fp": fp, "tn": tn, "fn": fn,
        "unmatched": len(calls) - len(read),
        "sensitivity": rate(tp, tp + fn, unit).to_dict() if tp + fn else None,
        "specificity": rate(tn, tn + fp, unit).to_dict() if tn + fp else None,
        "balanced_accuracy": _bootstrap(_balanced_accuracy, read, seed),
        "mcc": _bootstrap(_mcc, read, seed),
        "auroc": _bootstrap(_auroc, read, seed),
    }  # fmt: skip


def _balanced_accuracy(wrong: np.ndarray, called: np.ndarray, score: np.ndarray) -> float:
    return balanced_accuracy_score(wrong, called)


def _mcc(wrong: np.ndarray, called: np.ndarray, score: np.ndarray) -> float:
    return matthews_corrcoef(wrong, called)


def _auroc(wrong: np.ndarray, called: np.ndarray, score: np.ndarray) -> float:
    return roc_auc_score(wrong, score)


def _bootstrap(measure: Callable[..., float], calls: Sequence[Call], seed: int) -> dict | None:
    """{value, low, high, method} of a measure, resampling whole groups; None if only one class."""
    wrong = np.array([c.wrong for c in calls])
    called = np.array([c.called for c in calls])
    score = np.array([float(c.called) if c.score is None else c.score for c in calls])
    if wrong.all() or not wrong.any():
        return None
    _, group = np.unique([c.group for c in calls], return_inverse=True)
    members = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
    rng, found = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        drawn = rng.integers(0, len(members), len(members))
        rows = np.concatenate([members[g] for g in drawn])
        if 0 < wrong[rows].sum() < len(rows):
            found.append(measure(wrong[rows], called[rows], score[rows]))
    low, high = np.quantile(found, [0.025, 0.975]) if found else (np.nan, np.nan)
    value = float(measure(wrong, called, score))
    return {"value": value, "low": float(low), "high": float(high), "method": "group bootstrap"}
