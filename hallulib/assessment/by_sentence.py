"""What the grades of single sentences add: how much, of what kind, how grave, what was left out."""

from __future__ import annotations

from collections import Counter

from hallulib.assessment.opening import SYSTEMS
from hallulib.assessment.records import SessionRecord
from hallulib.evaluation.statistics import cluster_bootstrap_ratio, wilson_interval


def rate_sentences(record: SessionRecord) -> list[dict]:
    """Per system, over summaries graded sentence by sentence (repeats once):

    {system, summaries, n, hallucinated, value, low, high, major, general_knowledge, types,
    omitting}. `value` = hallucinated / n sentences with its interval (summaries resampled, as
    sentences of one are not independent; where none or all are, Wilson's over the number of
    summaries). `omitting`: summaries in which something is left out.
    Sentences supported by general knowledge alone are counted apart, never as hallucinated.
    """
    return [found for system in SYSTEMS if (found := _rate(record, system))]


def _rate(record: SessionRecord, system: str) -> dict | None:
    graded = [
        entry.grades[1]
        for slotting, entry in zip(record.queue, record.state.entries, strict=True)
        if entry.done and slotting.repeat_of is None and slotting.systems == (system,)
    ]
    graded = [grade for grade in graded if grade.labels]
    if not graded:
        return None
    wrong = [[g for g in grade.labels if g.verdict == "hallucinated"] for grade in graded]
    counts = [len(found) for found in wrong]
    sizes = [len(grade.labels) for grade in graded]
    none_or_all = sum(counts) in (0, sum(sizes))  # resampling would give a width of nothing
    bad = len(graded) if sum(counts) else 0
    interval = (
        wilson_interval(bad, len(graded)) if none_or_all else cluster_bootstrap_ratio(counts, sizes)
    )
    errors = [label for found in wrong for label in found]
    labels = [label for grade in graded for label in grade.labels]
    return {
        "system": system, "summaries": len(graded), "n": sum(sizes), "hallucinated": sum(counts),
        "value": sum(counts) / sum(sizes), "low": interval.low, "high": interval.high,
        "major": sum(error.severity == "major" for error in errors),
        "general_knowledge": sum(label.verdict == "general_knowledge" for label in labels),
        "types": dict(Counter(error.type or "no type" for error in errors)),
        "omitting": sum(bool(grade.omissions) for grade in graded),
    }  # fmt: skip
