"""From sessions to a result: one tidy table of grades, and figures with intervals from it.

Systems are named only in sums: the seal of a running session stays.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Template

from hallulib import files, rates
from hallulib.assessment import queue
from hallulib.assessment.log import Log
from hallulib.assessment.session import SIMULATED, Session, make_header, read_generations
from hallulib.errors import SessionError
from hallulib.recipe import Recipe
from hallulib.run import Run, stage

SUMMARY = "assessment/summary.json"
CODES = {"supported": 0, "hallucinated": 1, "unsure": 2}
Rows = list[dict[str, Any]]
Opinions = Callable[[queue.Item], list[tuple[str, dict]]]  # (letter, that assessor's grade)
Figure = tuple[str, str, rates.Rate | None]  # what it is, of whom, the rate


@dataclass(frozen=True)
class AssessmentResult:
    """`summary` as in assessment/summary.json. It rests on the fullest session of a person, or
    where no person has graded, of a script: `assessor_kind` says which."""

    summary: dict[str, Any]

    @property
    def figures(self) -> pd.DataFrame:
        """One row per figure: figure, of (whom), k, n, value, low, high, unit, method, text."""
        return pd.DataFrame(self.summary["figures"])

    @property
    def notes(self) -> dict[str, Any]:
        """What the manifest keeps."""
        graded = f"{self.summary['graded']}/{self.summary['total']}"
        return {"assessor_kind": self.summary["assessor_kind"], "graded": graded}

    def sentences(self) -> list[str]:
        """The result in words: never a bare percentage, never a script taken for a person."""
        words = Path(__file__).with_name("result.txt.j2").read_text("utf-8")
        return Template(words, trim_blocks=True).render(self.summary).splitlines()


def analyse_assessment(recipe: Recipe, run: Run) -> AssessmentResult:
    """Analyse the grades given so far and write assessment/summary.json (stage "assessment").
    Raises SessionError when nobody, not even the scripted assessor, has graded anything."""
    if run.path(SUMMARY).exists() and load_result(run).summary["events"] != hash_events(run):
        run.forget("assessment")
    return _analyse(recipe, run)


def load_result(run: Run) -> AssessmentResult:
    """The result as last written."""
    return AssessmentResult(json.loads(run.path(SUMMARY).read_text("utf-8")))


def hash_events(run: Run) -> str:
    """sha256 of all that assessors have done."""
    return files.sha256_text(" ".join(map(files.sha256_file, list_sessions(run))))


@stage("assessment", load=load_result)
def _analyse(recipe: Recipe, run: Run) -> AssessmentResult:
    sessions, table = tabulate(run)
    chosen = choose_sessions(sessions)
    if not chosen:
        why = "Nobody has graded a summary of this run yet."
        raise SessionError(why, "Grade some in notebook 07, or let the scripted assessor do it.")
    own = table[(table["session"] == chosen[0]["session"]) & (table["answer"] != "skip")]
    first, verdicts = settle(choose_first(own), table), spread(sessions, table)
    rows = files.read_jsonl(run.require("evaluation/evaluation.jsonl"))
    called = [(str(row["id"]), row["system"], row["hallucinated"]) for row in rows]
    items = pd.DataFrame(called, columns=["item_id", "system", "called"]).merge(first, how="outer")
    figures = [
        *measure_systems(items), *measure_sentences(first), *measure_preferences(first),
        *measure_agreement(items, own, verdicts),
    ]  # fmt: skip
    summary = chosen[0] | {
        "suggested": int(own["suggested"].sum()),
        "adjudicated": int(first["settled"].notna().sum()),
        "disputed": len(find_disputes(verdicts)),
        "paired": compare_systems(items),
        # a rate of nothing is left out; where no grade varies, kappa is neither zero nor one
        "figures": [
            {"figure": figure, "of": of, **(found.to_dict() if found else {}),
             "text": str(found) if found else "undefined (no variation)"}
            for figure, of, found in figures if found or figure in ("kappa", "alpha")
        ],
        "sessions": sessions,
        "events": hash_events(run),
    }  # fmt: skip
    files.write_json_atomic(run.path(SUMMARY), summary)
    return AssessmentResult(summary)


def list_sessions(run: Run) -> list[Path]:
    """The event files of a run."""
    return sorted(run.path("assessment").glob("*.events.jsonl"))


def tabulate(run: Run) -> tuple[Rows, pd.DataFrame]:
    """(a row per session, a row per item that was answered or skipped), as in header and `sum_up`.
    Sessions about other summaries than the run holds now are not `current` and have no grades.

    Of a pair (mode ab) `system` stands left, `other` right. `first`: where the item came first.
    """
    texts, sessions, grades = read_generations(run), [], []
    for log in map(Log, list_sessions(run)):
        who = {"session": log.name, "unblinded": log.unblinded, **log.header}
        held = all(
            (line["item_id"], name) in texts for line in log.queue for name in line["systems"]
        )
        shown = held and queue.hash_items(queue.fill_queue(log.queue, texts))
        current = shown == log.header["items_sha256"]
        sessions.append(who | log.progress() | {"current": current, "torn_bytes": log.torn})
        for place, (line, said) in enumerate(zip(log.queue, log.items, strict=True)):
            if current and said["answer"]:
                row = texts[line["item_id"], line["systems"][0]]
                first = place if line["repeat_of"] is None else line["repeat_of"]
                grades.append(who | said | {
                    "place": place, "first": first, "item_id": line["item_id"],
                    "system": line["systems"][0], "other": line["systems"][-1],
                    "source": row["context"], "summary": row["text"],
                })  # fmt: skip
    return sessions, pd.DataFrame(grades)


def choose_sessions(sessions: Rows, mode: str = "") -> Rows:
    """Sessions with a grade, the fullest first: people's, or where no person graded, scripts'. One
    for each assessor (their fullest; of equally full ones the newest) and no adjudications."""
    graded = [
        row for row in sessions
        if row["current"] and row["graded"] and row["role"] == "assess"
        and mode in ("", row["mode"])
    ]  # fmt: skip
    people = [row for row in graded if row["assessor_kind"] != SIMULATED]
    ordered = sorted(people or graded, key=lambda row: (row["graded"], row["created"]))
    fullest = {row["assessor_id"]: row for row in ordered}
    return [row for row in reversed(ordered) if row is fullest[row["assessor_id"]]]


def choose_first(grades: pd.DataFrame) -> pd.DataFrame:
    """What was graded, at its first showing."""
    return grades[(grades["first"] == grades["place"]) & (grades["answer"] != "skip")]


def spread(sessions: Rows, grades: pd.DataFrame) -> pd.DataFrame:
    """A row per (item id, system), a column per assessor: verdicts at the first showing."""
    chosen = [row["session"] for row in choose_sessions(sessions, "single")]
    own = choose_first(grades[grades["session"].isin(chosen)])
    return own.pivot(index=["item_id", "system"], columns="assessor", values="verdict")


def find_disputes(verdicts: pd.DataFrame) -> list[tuple[str, str]]:
    """(item id, system) of the summaries on which two assessors differ."""
    return verdicts.index[verdicts.nunique(axis=1) > 1].tolist()


def settle(first: pd.DataFrame, grades: pd.DataFrame) -> pd.DataFrame:
    """`first` with `settled`, the verdict of the last adjudicator of its kind, which takes the
    place of the assessor's where there is one."""
    kind = grades["assessor_kind"].isin(first["assessor_kind"])
    judged = choose_first(grades[(grades["role"] == "adjudicate") & kind]).sort_values("created")
    judged = judged.drop_duplicates(["item_id", "system"], keep="last")
    judged = judged[["item_id", "system", "verdict"]].rename(columns={"verdict": "settled"})
    first = first.merge(judged, how="left")
    return first.assign(verdict=first["settled"].combine_first(first["verdict"]))


def open_adjudication(run: Run, recipe: Recipe, assessor: str) -> tuple[Session, Opinions]:
    """Start or continue settling what the assessors of this run disagree on, in the same view, and
    what each said of an item. The systems stay sealed and the assessors are letters.
    Raises SessionError where nothing is disputed."""
    sessions, grades = tabulate(run)
    chosen = [row["session"] for row in choose_sessions(sessions, "single")]
    disputes = find_disputes(spread(sessions, grades)) if chosen else []
    if not disputes:
        why = f"{len(chosen)} assessor(s) have graded, and no summary has two different verdicts."
        raise SessionError(why, "Let a second one grade: open_session(run, recipe, assessor=...).")
    random.Random(f"adjudicate-{recipe.seed}").shuffle(disputes)  # an order that tells nothing
    places = [queue.make_place(item, [system]) for item, system in disputes]
    header = make_header(assessor, recipe.seed, role="adjudicate")
    session = Session(run.path("assessment"), read_generations(run), places, header)
    first = choose_first(grades).to_dict("records")
    given = {(row["item_id"], row["system"], row["session"]): row for row in first}

    def find_opinions(item: queue.Item) -> list[tuple[str, dict]]:
        (system,) = session.log.queue[item.place]["systems"]
        rows = [given.get((item.item_id, system, name)) for name in chosen]
        return [(f"Assessor {chr(65 + n)}", row) for n, row in enumerate(rows) if row]

    return session, find_opinions


def measure_systems(items: pd.DataFrame) -> Iterator[Figure]:
    """Rates per system. items: a row per evaluated summary; `verdict` of the graded ones, `called`
    (hallucinated) of those that the detector could judge.

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
        found = rates.correct_by_people(bad, both["called"], rest["called"], "summaries")
        enough = found is not None and found.method == "PPI++"
        yield f"detector corrected (PPI++{'' if enough else ': too few grades'})", system, found


def measure_sentences(first: pd.DataFrame) -> Iterator[Figure]:
    """What grades by sentence add, per system; summaries are resampled whole, as sentences of one
    are not independent. General knowledge is counted apart, never as an error."""
    for system, own in first[first["labels"].map(len) > 0].groupby("system"):
        labels = own["labels"].map(lambda by_sentence: list(by_sentence.values())).explode()
        labels = pd.DataFrame(labels.tolist(), index=labels.index)
        bad = labels["verdict"] == "hallucinated"
        wrong, sizes = bad.groupby(level=0).sum(), bad.groupby(level=0).size()
        yield "hallucinated sentences", system, rates.ratio(wrong, sizes, "sentences")
        general = labels["verdict"] == "general_knowledge"
        yield "general knowledge", system, count(general, "sentences")
        errors = labels[bad].fillna({"type": "without a type"})
        yield "major", system, count(errors["severity"] == "major", "errors")
        for name in sorted(set(errors["type"])):
            yield name, system, count(errors["type"] == name, "errors")
        yield "something left out", system, count(own["omissions"].map(len) > 0, "summaries")


def measure_preferences(first: pd.DataFrame) -> Iterator[Figure]:
    """Mode ab: the pairs in which each system was preferred, whichever its side."""
    pairs = first.dropna(subset="preference")
    better = pairs["system"].where(pairs["preference"] < 0, pairs["other"])
    better = better.where(pairs["preference"] != 0, "neither")
    for name in (*queue.SYSTEMS, "neither"):
        yield "preferred", name, count(better == name, "pairs")


def measure_agreement(
    items: pd.DataFrame, own: pd.DataFrame, verdicts: pd.DataFrame
) -> Iterator[Figure]:
    """Agreement and kappa of two raters on the same items: the assessor and the detector where both
    are definite, the assessor and themselves on repeats, every two assessors; and Krippendorff's
    alpha of all."""
    sure = items.dropna(subset=["verdict", "called"]).query("verdict != 'unsure'")
    said = own.assign(said=own["verdict"].fillna(own["preference"]).astype(str))
    twice = said[said["first"] != said["place"]].merge(said, left_on="first", right_on="place")
    pairs = {
        "assessor and detector": (sure["verdict"] == "hallucinated", sure["called"].astype(bool)),
        "assessor with themselves": (twice["said_x"], twice["said_y"]),
    }
    for names in combinations(verdicts, 2):
        both = verdicts[[*names]].dropna()
        pairs[" and ".join(names)] = tuple(both[name] for name in names)
    for of, (one, other) in pairs.items():
        if len(one):
            yield "agreement", of, count(one.to_numpy() == other.to_numpy(), "items")
            yield "kappa", of, rates.kappa(one.tolist(), other.tolist())
    shared = verdicts[verdicts.notna().sum(axis=1) > 1]
    if len(shared):
        coded = [shared[name].map(CODES).astype(float).to_numpy() for name in shared]
        value, bounds = rates.alpha(coded), rates.resample(lambda *own: rates.alpha(own), *coded)
        bounds = (None, None) if isnan(bounds[0]) else bounds
        found = rates.Rate(value, *bounds, "items", "alpha", n=len(shared))
        yield "alpha", "all assessors", None if value is None else found


def compare_systems(items: pd.DataFrame) -> dict[str, float] | None:
    """sft against dpo on notes with a definite grade under both; None without such notes."""
    sure = items[items["verdict"].isin(["supported", "hallucinated"])]
    wide = sure.pivot(index="item_id", columns="system", values="verdict")
    wide = wide.reindex(columns=queue.SYSTEMS).dropna() == "hallucinated"
    return rates.compare_paired(wide["sft"], wide["dpo"]) if len(wide) else None


def count(flags: Iterable[bool], unit: str) -> rates.Rate | None:
    """The share of flags that are set."""
    flags = list(flags)
    return rates.rate(sum(flags), len(flags), unit)
