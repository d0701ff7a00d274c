"""How good a detector is: against a better one, or against people. "Positive" = hallucinated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef, roc_auc_score

from hallulib.detectors.base import Detector, Judgement, Source
from hallulib.errors import DataError
from hallulib.rates import Rate, rate

_RESAMPLES = 300
_MEASURES: dict[str, Callable[..., float]] = {
    "balanced_accuracy": lambda wrong, called, score: balanced_accuracy_score(wrong, called),
    "mcc": lambda wrong, called, score: matthews_corrcoef(wrong, called),
    "auroc": lambda wrong, called, score: roc_auc_score(wrong, score),
}


class Case(NamedTuple):
    """A text of which one knows whether it is hallucinated against its source (None: unknown), and
    the document (`group`) it belongs to."""

    source: Source
    text: str
    hallucinated: bool | None
    group: str


# One unit: is it wrong, was it called wrong (None: one side could not read it), how surely; group
_Call = tuple[bool | None, bool | None, float | None, str]


def measure_detector(detector: Detector, cases: Iterable[Case], unit: str) -> dict[str, Any]:
    """Hold a detector against people's labels; the figures are those of `measure_judge`."""
    calls = []
    for case in cases:
        judged = detector.judge(case.source, case.text)
        calls.append((case.hallucinated, judged.hallucinated, judged.score, case.group))
    return {"detector": detector.name, "truth": "people"} | _summarise(calls, unit)


def measure_judge(
    detector: Detector, rows: Iterable[tuple[Source, str]], truth_detector: Detector
) -> dict[str, Any]:
    """Hold a detector against a better one on (source, summary) rows, by statements of the better:
    one is called wrong if any statement of the detector that overlaps it is wrong.

    Returns {detector, truth, unit, n, tp, fp, tn, fn, unmatched: units that one side could not read
    and that are in no rate} and the rates sensitivity, specificity (Wilson), balanced_accuracy, mcc
    and auroc (bootstrap over groups) as dicts of a Rate; None where one is not defined, as without
    a positive. Raises DataError when nothing is compared.
    """
    calls: list[_Call] = []
    for source, summary in rows:
        judged = detector.judge(source, summary)
        for true in truth_detector.judge(source, summary).statements:
            over = [s for s in judged.statements if s.start < true.end and true.start < s.end]
            part = Judgement(over, [], judged.detector)
            wrong = None if true.verdict == "unparsed" else true.is_error
            calls.append((wrong, part.hallucinated, part.score, source.text))
    names = {"detector": detector.name, "truth": truth_detector.name}
    return names | _summarise(calls, "statement")


def _summarise(calls: list[_Call], unit: str) -> dict[str, Any]:
    read = [call for call in calls if None not in call[:2]]
    if not read:
        raise DataError(
            "the judge was not compared with anything: no row gave a verdict by both detectors",
            "pass rows with non-empty summaries",
        )
    pairs = [call[:2] for call in read]
    tp, fn = pairs.count((True, True)), pairs.count((True, False))
    fp, tn = pairs.count((False, True)), pairs.count((False, False))
    rates = {"sensitivity": rate(tp, tp + fn, unit), "specificity": rate(tn, tn + fp, unit)}
    rates |= _bootstrap(read, unit)
    counts = {"unit": unit, "n": len(read), "tp": tp, "fp": fp, "tn": tn, "fn": fn}
    counts["unmatched"] = len(calls) - len(read)
    return counts | {name: value and value.to_dict() for name, value in rates.items()}


def _bootstrap(calls: list[_Call], unit: str) -> dict[str, Rate | None]:
    """Each of _MEASURES, resampling whole groups; None if there is only one class."""
    wrong, called = (np.array([call[i] for call in calls]) for i in (0, 1))
    score = np.array([float(c) if s is None else s for _, c, s, _ in calls])
    if wrong.all() or not wrong.any():
        return dict.fromkeys(_MEASURES)
    _, group = np.unique([call[3] for call in calls], return_inverse=True)
    members = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
    rng, draws = np.random.default_rng(0), []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        if 0 < wrong[rows].sum() < len(rows):
            draws.append(rows)
    rates = {}
    for name, measure in _MEASURES.items():
        found = [measure(wrong[rows], called[rows], score[rows]) for rows in draws] or [np.nan]
        bounds = map(float, np.quantile(found, [0.025, 0.975]))
        value = float(measure(wrong, called, score))
        rates[name] = Rate(value, *bounds, unit, "group bootstrap")
    return rates
