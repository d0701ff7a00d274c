"""From verdicts to numbers: every rate with its unit, denominator and interval.

The primary metric is `hallucination_rate@summary`: summaries with at least one hallucinated
statement, of those in which at least one statement could be read. It never stands alone: answer
rate, omissions, length and unreadable statements stand beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hallulib.detectors.base import Judgement
from hallulib.evaluation.statistics import (
    Interval,
    adjust_holm,
    cluster_bootstrap_ratio,
    cochran_q,
    compare_paired,
    estimate_proportion,
    wilson_interval,
)

PRIMARY = "hallucination_rate@summary"
# A guardrail turns red when the second system is worse than the first by more than this.
GUARDRAIL_LIMITS = {
    "omission_rate": 0.02,  # share of the note's facts, absolute
    "answer_rate": 0.01,  # share of summaries, absolute
    "unparsed_statement_rate": 0.02,  # share of statements, absolute
    "mean_words": 0.15,  # relative
}

Record = dict[str, Any]


def make_record(generation: Record, judgement: Judgement) -> Record:
    """One row of evaluation.jsonl: a generated summary with its verdicts and counts.

    `hallucinated` is None (not False) for a summary in which nothing could be read.
    """
    return {
        "id": generation["id"],
        "group_id": generation["group_id"],
        "style": generation["style"],
        "style_group": generation["style_group"],
        "system": generation["system"],
        "detector": judgement.detector,
        "answered": judgement.answered,
        "hallucinated": judgement.hallucinated,
        "score": judgement.score,
        "n_statements": len(judgement.statements),
        "n_errors": judgement.errors,
        "n_unparsed": judgement.unparsed,
        "n_stated": judgement.stated,
        "stated_unit": judgement.stated_unit,
        "n_words": len(generation["text"].split()),
        "n_tokens": generation["n_tokens"],
        "finish_reason": generation["finish_reason"],
        "n_omitted": len(judgement.omissions),
        "omissions": list(judgement.omissions),
        "statements": [statement.to_dict() for statement in judgement.statements],
    }


def summarise_system(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """All figures of one system: plain numbers, and under "rates" each rate as {k, n, value, low,
    high, level, method, unit} (None where its n is 0).

    hallucination_rate and interval are those of the primary metric. omission_rate = facts the note
    states and the summary lacks, of all facts the notes state, pooled; an empty summary lacks all.
    """
    rates = measure_rates(records, seed)
    primary = rates[PRIMARY]
    errors = [s for r in records for s in r["statements"] if s["error_type"]]
    return {
        "n": len(records),
        "answered": sum(r["answered"] for r in records),
        "hallucinated": sum(bool(r["hallucinated"]) for r in records),
        "hallucination_rate": read_value(primary),
        "interval": [primary["low"], primary["high"]] if primary else [None, None],
        "omission_rate": read_value(rates["omission_rate"]),
        "answer_rate": read_value(rates["answer_rate"]),
        "statement_rate": read_value(rates["statement_rate"]),
        "unparsed_statement_rate": read_value(rates["unparsed_statement_rate"]),
        "unparsed_statements": sum(r["n_unparsed"] for r in records),
        "omissions_per_summary": _mean([len(r["omissions"]) for r in records]),
        "errors_per_summary": _mean([r["n_errors"] for r in records]),
        "mean_words": _mean([r["n_words"] for r in records]),
        "mean_tokens": _mean([r["n_tokens"] for r in records]),
        "truncated": sum(r["finish_reason"] == "length" for r in records),
        "error_types": dict(Counter(s["error_type"] for s in errors).most_common()),
        "error_kinds": dict(Counter(s["kind"] for s in errors).most_common()),
        "omitted_kinds": dict(_count_omissions(records).most_common()),
        "rates": rates,
    }


def measure_rates(records: Sequence[Record], seed: int = 0) -> dict[str, dict | None]:
    """Every rate of one system with interval and unit. Rates of statements and of facts come with a
    bootstrap over whole documents; suspect_rate counts unreadable summaries as wrong."""
    n, answered = len(records), [r for r in records if r["answered"]]
    wrong = sum(bool(r["hallucinated"]) for r in answered)
    suspect = sum(bool(r["hallucinated"]) or not r["answered"] or r["n_unparsed"] for r in records)
    return {
        PRIMARY: _rate(wrong, len(answered), "answered summary"),
        "hallucination_rate@all": _rate(wrong, n, "summary"),
        "suspect_rate@summary": _rate(int(suspect), n, "summary"),
        "answer_rate": _rate(len(answered), n, "summary"),
        "statement_rate": _ratio(records, "n_errors", "n_statements", "statement", seed),
        "unparsed_statement_rate": _ratio(
            records, "n_unparsed", "n_statements", "statement", seed
        ),
        "omission_rate": _ratio(records, "n_omitted", "n_stated", _name_stated(records), seed),
    }


def _name_stated(records: Sequence[Record]) -> str:
    """What could have been left out, in the words of the detector that reports."""
    return next((r["stated_unit"] for r in records if r["n_stated"]), "fact of the note")


def _count_omissions(records: Sequence[Record]) -> Counter[str]:
    """How often each kind was left out; sentences of references are no kinds, and not counted."""
    return Counter(
        k for r in records if r["stated_unit"] == "fact of the note" for k in r["omissions"]
    )


def _rate(k: int, n: int, unit: str) -> dict[str, Any] | None:
    return estimate_proportion(k, n, unit).to_dict() if n else None


def _ratio(records: Sequence[Record], top: str, bottom: str, unit: str, seed: int):
    groups: dict[str, list[int]] = {}  # summaries of one document are resampled together
    for record in records:
        sums = groups.setdefault(record["group_id"], [0, 0])
        sums[0], sums[1] = sums[0] + record[top], sums[1] + record[bottom]
    above, below = (list(side) for side in zip(*groups.values(), strict=True))
    if not sum(below):
        return None
    interval = _interval(above, below, seed)
    return {
        "k": sum(above), "n": sum(below), "value": sum(above) / sum(below), "low": interval.low,
        "high": interval.high, "level": interval.level, "method": interval.method, "unit": unit,
    }  # fmt: skip


def _interval(above: list[int], below: list[int], seed: int) -> Interval:
    """Bootstrap over documents. Where none (or all) of them shows the event, every resample looks
    the same; then the interval of the share of documents bounds the rate."""
    if 0 < sum(above) < sum(below):
        return cluster_bootstrap_ratio(above, below, seed=seed)
    documents = sum(n > 0 for n in below)
    bound = wilson_interval(documents if sum(above) else 0, documents)
    return replace(bound, method="Wilson over documents")


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def compare_systems(first: Sequence[Record], second: Sequence[Record]) -> dict[str, Any]:
    """Paired comparison of two systems, joined by id (never by row order).

    Returns {a, b: names, metric, n_excluded, paired: {n, b, c, difference, low, high, p_exact,
    p_mid, ...} or None}. Items that one of them did not answer are excluded and counted.
    Raises ValueError where the two were not evaluated on the same items.
    """
    left, right = {r["id"]: r for r in first}, {r["id"]: r for r in second}
    if left.keys() != right.keys() or len(left) != len(first) or len(right) != len(second):
        raise ValueError("the two systems were not evaluated on the same items, once each")
    ids = [i for i in left if left[i]["answered"] and right[i]["answered"]]
    paired = None
    if ids:
        before = [left[i]["hallucinated"] for i in ids]
        paired = compare_paired(before, [right[i]["hallucinated"] for i in ids]).to_dict()
    return {
        "a": first[0]["system"],
        "b": second[0]["system"],
        "metric": PRIMARY,
        "n_excluded": len(left) - len(ids),
        "paired": paired,
    }


def compare_all(groups: dict[str, list[Record]]) -> dict[str, Any] | None:
    """Cochran's Q over the items that every system answered: {systems, n, n_excluded, q, p}; None
    for fewer than three systems, where it would only repeat McNemar's test, or without items."""
    rows = [{r["id"]: r for r in members} for members in groups.values()]
    ids = [i for i in rows[0] if all(i in row and row[i]["answered"] for row in rows)]
    if len(rows) < 3 or not ids:
        return None
    q, p = cochran_q([[row[i]["hallucinated"] for i in ids] for row in rows])
    excluded = len(rows[0]) - len(ids)
    return {"systems": list(groups), "n": len(ids), "n_excluded": excluded, "q": q, "p": p}


def add_holm(comparisons: Sequence[dict[str, Any]]) -> None:
    """Put p_holm beside each comparison's p_exact: as it counts among all that were made."""
    made = [c["paired"] for c in comparisons if c["paired"]]
    for paired, p in zip(made, adjust_holm([c["p_exact"] for c in made]), strict=True):
        paired["p_holm"] = p


def check_guardrails(a: str, b: str, systems: dict[str, dict]) -> list[dict[str, Any]]:
    """Did system b buy a lower rate? One entry per guardrail: {name, a, b, before, after, change,
    limit, ok}. `change` is positive when b is worse; relative for mean_words, else absolute."""
    entries = []
    for name, limit in GUARDRAIL_LIMITS.items():
        before, after = systems[a][name], systems[b][name]
        if before is None or after is None:
            continue
        rising_is_worse = name in ("omission_rate", "unparsed_statement_rate")
        change = after - before if rising_is_worse else before - after
        if name == "mean_words":
            change = change / before if before else 0.0
        entries.append({
            "name": name, "a": a, "b": b, "before": before, "after": after, "change": change,
            "limit": limit, "ok": change <= limit,
        })  # fmt: skip
    return entries


def read_value(rate: dict | None) -> float | None:
    """The share in a rate; None where nothing was counted."""
    return rate["value"] if rate else None


def summarise_styles(records: Sequence[Record], seed: int = 0) -> dict[str, dict]:
    """style group ("seen", "held_out") -> system -> figures; empty where styles are not known."""
    groups = sorted({r["style_group"] for r in records if r["style_group"]}, reverse=True)
    return {
        group: {
            system: summarise_system(members, seed)
            for system, members in group_by_system(
                [r for r in records if r["style_group"] == group]
            ).items()
        }
        for group in groups
    }


def group_by_system(records: Sequence[Record]) -> dict[str, list[Record]]:
    """system -> its records, in the order in which they stand."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["system"], []).append(record)
    return groups


def choose_comparisons(systems: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that are compared, declared before looking: each step of the training, and each
    other arm against SFT before it and against DPO beside it."""
    arms = [name for name in systems if name not in ("base", "sft", "dpo")]
    pairs = [("base", "sft"), ("sft", "dpo")]
    pairs += [pair for arm in arms for pair in (("sft", arm), (arm, "dpo"))]
    return [(a, b) for a, b in pairs if a in systems and b in systems]


def build_summary(records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """The figures of summary.json: {primary, n, detector, systems, comparisons, all_systems,
    guardrails, by_style}. Raises ValueError without records."""
    if not records:
        raise ValueError("there is nothing to summarise: no records")
    groups = group_by_system(records)
    systems = {name: summarise_system(members, seed) for name, members in groups.items()}
    pairs = choose_comparisons(list(groups))
    comparisons = [compare_systems(groups[a], groups[b]) for a, b in pairs]
    add_holm(comparisons)
    return {
        "primary": PRIMARY,
        "n": len({r["id"] for r in records}),
        "detector": records[0]["detector"],
        "systems": systems,
        "comparisons": comparisons,
        "all_systems": compare_all(groups),
        "guardrails": [g for a, b in pairs if a != "base" for g in check_guardrails(a, b, systems)],
        "by_style": summarise_styles(records, seed),
    }
