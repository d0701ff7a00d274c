"""What grades say: rates with intervals, agreement, the detector corrected by people.

Every figure is one row of one table: what it is, of whom, and a `Rate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from math import isnan
from typing import Any

import pandas as pd

from hallulib.assessment.queue import SYSTEMS
from hallulib.rates import (
    Rate,
    alpha,
    compare_paired,
    correct_by_people,
    kappa,
    rate,
    ratio,
    resample,
)

Figure = tuple[str, str, Rate | None]  # what it is, of whom, the rate
CODES = {"supported": 0, "hallucinated": 1, "unsure": 2}


def list_figures(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """Figures as rows, with their text for a reader. A rate of nothing is left out; where no grade
    varies, kappa and alpha are undefined, neither zero nor one."""
    return [
        {"figure": figure, "of": of, **(found.to_dict() if found else {}),
         "text": str(found) if found else "undefined (no variation)"}
        for figure, of, found in figures
        if found or figure in ("kappa", "alpha")
    ]  # fmt: skip


def measure_systems(items: pd.DataFrame) -> Iterator[Figure]:
    """Rates per system. items: a row per evaluated summary; `verdict` of the graded ones, `called`
    of those that the detector could judge.

    Unsure grades are counted apart. The detector's rate is corrected by the grades (PPI++); with
    too few of them, people's rate stands alone.
    """
    for system, own in items.groupby("system"):
        graded = own.dropna(subset="verdict")
        sure = graded[graded["verdict"] != "unsure"]
        yield "hallucinated", system, count(sure["verdict"] == "hallucinated", "summaries")
        yield "unsure", system, count(graded["verdict"] == "unsure", "summaries")
        both, rest = sure.dropna(subset="called"), own.drop(sure.index).dropna(subset="called")
        bad = both["verdict"] == "hallucinated"
        found = correct_by_people(bad, both["called"], rest["called"], "summaries")
        enough = found is not None and found.method == "PPI++"
        yield f"detector corrected (PPI++{'' if enough else ': too few grades'})", system, found


def measure_sentences(first: pd.DataFrame) -> Iterator[Figure]:
    """What grades by sentence add, per system; summaries are resampled whole, as sentences of one
    are not independent. General knowledge is counted apart, never as an error."""
    for system, own in first[first["labels"].map(len) > 0].groupby("system"):
        labels = own["labels"].explode()
        verdicts = labels.map(lambda label: label.verdict)
        bad = (verdicts == "hallucinated").groupby(level=0)
        found = ratio(bad.sum().tolist(), bad.size().tolist(), "sentences")
        yield "hallucinated sentences", system, found
        yield "general knowledge", system, count(verdicts == "general_knowledge", "sentences")
        errors = labels[verdicts == "hallucinated"]
        yield "major", system, count([label.severity == "major" for label in errors], "errors")
        types = [label.type or "without a type" for label in errors]
        for name in sorted(set(types)):
            yield name, system, count([kind == name for kind in types], "errors")
        yield "something left out", system, count(own["omissions"].map(len) > 0, "summaries")


def measure_preferences(first: pd.DataFrame) -> Iterator[Figure]:
    """Mode ab: the pairs in which each system was preferred, whichever its side."""
    pairs = first.dropna(subset="preference")
    better = pairs["system"].where(pairs["preference"] < 0, pairs["other"])
    better = better.where(pairs["preference"] != 0, "neither")
    for name in (*SYSTEMS, "neither"):
        yield "preferred", name, count(better == name, "pairs")


def measure_agreement(items: pd.DataFrame) -> Iterator[Figure]:
    """The assessor against the detector, where both are definite."""
    both = items.dropna(subset=["verdict", "called"]).query("verdict != 'unsure'")
    bad, called = both["verdict"] == "hallucinated", both["called"].astype(bool)
    yield from compare("assessor and detector", bad, called)


def measure_repeats(grades: pd.DataFrame) -> Iterator[Figure]:
    """The assessor against themselves, on items that were shown twice."""
    answers = grades["verdict"].fillna(grades["preference"]).astype(str)
    done = grades.assign(answer=answers)
    twice = done[done["is_repeat"]].merge(done, left_on="first", right_on="place")
    yield from compare("assessor with themselves", twice["answer_x"], twice["answer_y"])


def compare_people(verdicts: pd.DataFrame) -> Iterator[Figure]:
    """Every two assessors (columns) who graded the same summaries, and Krippendorff's alpha."""
    for first, second in combinations(verdicts, 2):
        both = verdicts[[first, second]].dropna()
        yield from compare(f"{first} and {second}", both[first], both[second])
    shared = verdicts[verdicts.notna().sum(axis=1) > 1]
    if len(shared):
        coded = [shared[name].map(CODES).astype(float).to_numpy() for name in shared]
        value = alpha(coded)
        low, high = resample(lambda *rows: alpha(rows), *coded)
        bounds = (None, None) if isnan(low) else (low, high)
        found = None if value is None else Rate(value, *bounds, "items", "alpha", n=len(shared))
        yield "alpha", "all assessors", found


def compare(of: str, first: pd.Series, second: pd.Series) -> Iterator[Figure]:
    """Two raters on the same items: the share that agrees, and kappa. Nothing of no items."""
    if len(first):
        yield "agreement", of, count(first.to_numpy() == second.to_numpy(), "items")
        yield "kappa", of, kappa(first.tolist(), second.tolist())


def compare_systems(items: pd.DataFrame) -> dict[str, float] | None:
    """sft against dpo on notes with a definite grade under both; None without such notes."""
    sure = items[items["verdict"].isin(["supported", "hallucinated"])]
    wide = sure.pivot(index="item_id", columns="system", values="verdict")
    wide = wide.reindex(columns=SYSTEMS).dropna() == "hallucinated"
    return compare_paired(wide["sft"], wide["dpo"]) if len(wide) else None


def count(flags: Iterable[bool], unit: str) -> Rate | None:
    """The share of flags that are set."""
    flags = list(flags)
    return rate(sum(flags), len(flags), unit)
