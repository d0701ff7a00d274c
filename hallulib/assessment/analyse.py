"""From sessions to a result: grades as one tidy table, and figures with intervals from it.

Systems are named only in sums. The seal of a running session stays: nothing here tells an assessor
which summary came from which system.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from hallulib.assessment.figures import (
    compare_people,
    compare_systems,
    list_figures,
    measure_agreement,
    measure_preferences,
    measure_repeats,
    measure_sentences,
    measure_systems,
)
from hallulib.assessment.log import ItemState, Log, State
from hallulib.assessment.queue import Item, Place, fill_queue, hash_items, make_place
from hallulib.assessment.session import SIMULATED, Session, make_header, read_generations
from hallulib.errors import SessionError
from hallulib.files import read_jsonl, sha256_text, write_json_atomic
from hallulib.recipe import Recipe
from hallulib.run import Run, stage

SUMMARY = "assessment/summary.json"
Opinions = Callable[[Item], list[tuple[str, ItemState]]]  # (letter, what that assessor said)


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
        found, script = self.summary, self.summary["assessor_kind"] == SIMULATED
        lines = [f"{row['of']}, {row['figure']}: {row['text']}." for row in found["figures"]]
        if pair := found["paired"]:
            lines.append(
                f"On the {pair['n']} notes graded under both: {pair['b']} wrong only under sft, "
                f"{pair['c']} only under dpo; exact McNemar p = {pair['p']:.3g}."
            )
        who = "a SIMULATED assessor" if script else "1 person, blind"
        lines.append(
            f"Graded by {who}: {found['graded']} of {found['total']} items, {found['skipped']} "
            f"skipped, {found['total'] - found['graded']} unfinished; {found['suggested']} with "
            f"the detector's opinion in view, {found['adjudicated']} settled by adjudication."
        )
        if script:
            lines.append(
                "These grades come from a script that copies the detector and errs now and then: "
                "they show that the tool works, and say nothing about a person's judgement."
            )
        return lines


def analyse_assessment(recipe: Recipe, run: Run) -> AssessmentResult:
    """Analyse the grades given so far and write assessment/summary.json (stage "assessment").

    Grades given since the last analysis make it run again. Raises SessionError when nobody, not
    even the scripted assessor, has graded anything.
    """
    if run.path(SUMMARY).exists():
        recorded = json.loads(run.path(SUMMARY).read_text("utf-8"))["grades_sha256"]
        if recorded != _hash_grades(read_logs(run)):
            run.forget("assessment")
    return _analyse(recipe, run)


def load_result(run: Run) -> AssessmentResult:
    """The result as last written."""
    return AssessmentResult(json.loads(run.require(SUMMARY).read_text("utf-8")))


@stage("assessment", load=load_result)
def _analyse(recipe: Recipe, run: Run) -> AssessmentResult:
    logs = read_logs(run)
    current = keep_current(logs, run)
    chosen = choose_logs(current)
    if not chosen:
        raise SessionError(
            "Nobody has graded a summary of this run yet.",
            "Grade some in notebook 07_assessment_widget, or let the scripted assessor do it.",
        )
    best, kind = chosen[0], chosen[0].header["assessor_kind"]
    grades, verdicts = tabulate([best]), spread(tabulate(choose_logs(current, "single")))
    grades = grades[~grades["skipped"]]
    settled = find_settled(current, kind)
    first = settle(grades[~grades["is_repeat"]], settled)
    items = read_detector(run).merge(first, how="outer")
    figures = [
        *measure_systems(items), *measure_sentences(first), *measure_preferences(first),
        *measure_agreement(items), *measure_repeats(grades), *compare_people(verdicts),
    ]  # fmt: skip
    summary = {
        "assessor_kind": kind,
        "assessor": best.header["assessor"],
        "session": best.name,
        **State.replay(best).progress(),
        "suggested": int(grades["suggested"].sum()),
        "adjudicated": len(settled),
        "disputed": len(find_disputes(verdicts)),
        "paired": compare_systems(items),
        "figures": list_figures(figures),
        "sessions": [_describe_log(log, log in current) for log in logs],
        "grades_sha256": _hash_grades(logs),
    }
    write_json_atomic(run.path(SUMMARY), summary)
    return AssessmentResult(summary)


# --- which sessions count -----------------------------------------------------------------------


def read_logs(run: Run) -> list[Log]:
    """Every session of a run, in the order of their names."""
    return [Log.read(path) for path in sorted(run.path("assessment").glob("*.events.jsonl"))]


def keep_current(logs: list[Log], run: Run) -> list[Log]:
    """Those about the summaries that the run holds now."""
    rows, current = read_generations(run), []
    for log in logs:
        try:
            shown = hash_items(fill_queue(log.queue, rows))
        except KeyError:
            continue
        current += [log] if shown == log.header["items_sha256"] else []
    return current


def choose_logs(logs: list[Log], mode: str = "") -> list[Log]:
    """Sessions with a grade, the fullest first: people's, or where no person graded, scripts'.

    One for each assessor (their fullest; of equally full ones the newest) and no adjudications.
    """
    graded = [
        (State.replay(log).progress()["graded"], log.header["created"], log)
        for log in logs
        if log.header["role"] == "assess" and mode in ("", log.header["mode"])
    ]
    ordered = [log for count, _, log in sorted(graded, key=lambda row: row[:2]) if count]
    people = [log for log in ordered if log.header["assessor_kind"] != SIMULATED]
    own: dict[str, Log] = {}
    for log in reversed(people or ordered):
        own.setdefault(log.header["assessor_id"], log)
    return list(own.values())


def _describe_log(log: Log, is_current: bool) -> dict[str, Any]:
    about = {"session": log.name, "assessor": log.header["assessor"], "current": is_current}
    return about | State.replay(log).progress() | {"torn_bytes": log.torn}


def _hash_grades(logs: list[Log]) -> str:
    lines = [action.model_dump_json() for log in logs for action in log.actions]
    return sha256_text("\n".join(lines))


# --- grades as a table --------------------------------------------------------------------------

COLUMNS = ["item_id", "system", "is_repeat", "assessor", "verdict"]  # of a table without a grade


def tabulate(logs: Sequence[Log]) -> pd.DataFrame:
    """One row per item that was answered or skipped. Of a pair (mode ab) `system` stands left and
    `other` right, and `preference` is the answer. `first`: the place where an item came first."""
    rows = []
    for log in logs:
        state = State.replay(log)
        who = {name: log.header[name] for name in ("assessor", "assessor_kind", "role", "mode")}
        who |= {"session": log.name, "sealed": not state.unblinded}
        for place, (line, item) in enumerate(zip(log.queue, state.items, strict=True)):
            if item.answer:
                rows.append(who | _list_grade(place, line, item))
    return pd.DataFrame(rows, columns=None if rows else COLUMNS)


def _list_grade(place: int, line: Place, item: ItemState) -> dict[str, Any]:
    is_repeat = line["repeat_of"] is not None
    return {
        "place": place,
        "is_repeat": is_repeat,
        "first": line["repeat_of"] if is_repeat else place,
        "item_id": line["item_id"],
        "system": line["systems"][0],
        "other": line["systems"][-1],
        "verdict": item.answer.verdict,
        "preference": item.answer.preference,
        "labels": list(item.labels.values()),
        "omissions": item.omissions,
        "note": item.note,
        "flagged": item.flagged,
        "skipped": item.skipped,
        "suggested": bool(item.answer.suggested),
        "seconds": item.answer.seconds,
    }


def find_settled(logs: Sequence[Log], kind: str) -> pd.Series:
    """(item id, system) -> the verdict of the last adjudicator of this kind."""
    judges = [log for log in logs if log.header["role"] == "adjudicate"]
    judges = [log for log in judges if log.header["assessor_kind"] == kind]
    verdicts = tabulate(sorted(judges, key=lambda log: log.header["created"]))
    verdicts = verdicts.dropna(subset="verdict").drop_duplicates(["item_id", "system"], keep="last")
    return verdicts.set_index(["item_id", "system"])["verdict"]


def settle(grades: pd.DataFrame, settled: pd.Series) -> pd.DataFrame:
    """The grades, an adjudicator's verdict in the place of the assessor's where there is one."""
    places = pd.MultiIndex.from_frame(grades[["item_id", "system"]])
    verdicts = pd.Series(settled.reindex(places).to_numpy(), index=grades.index)
    return grades.assign(verdict=verdicts.fillna(grades["verdict"]))


def spread(grades: pd.DataFrame) -> pd.DataFrame:
    """A row per (item id, system), a column per assessor: verdicts at the first showing."""
    first = grades[~grades["is_repeat"].astype(bool)].dropna(subset="verdict")
    return first.pivot(index=["item_id", "system"], columns="assessor", values="verdict")


def find_disputes(verdicts: pd.DataFrame) -> list[tuple[str, str]]:
    """(item id, system) of the summaries on which two assessors differ."""
    return verdicts.index[verdicts.nunique(axis=1) > 1].tolist()


def read_detector(run: Run) -> pd.DataFrame:
    """item_id, system, and `called`: what the evaluation's detector said (True: hallucinated)."""
    rows = read_jsonl(run.require("evaluation/evaluation.jsonl"))
    found = [(str(row["id"]), row["system"], row["hallucinated"]) for row in rows]
    return pd.DataFrame(found, columns=["item_id", "system", "called"])


# --- adjudication -------------------------------------------------------------------------------


def open_adjudication(run: Run, recipe: Recipe, assessor: str) -> tuple[Session, Opinions]:
    """Start or continue settling what the assessors of this run disagree on, in the same view, and
    what each said of an item. The systems stay sealed and the assessors are letters.

    Raises SessionError where fewer than two have graded the same summaries, or nothing is disputed.
    """
    logs = choose_logs(keep_current(read_logs(run), run), "single")
    disputes = find_disputes(spread(tabulate(logs)))
    if not disputes:
        raise SessionError(
            f"{len(logs)} assessor(s) have graded, and no summary has two different verdicts.",
            "Let a second assessor grade: open_session(run, recipe, assessor=...).",
        )
    random.Random(f"adjudicate-{recipe.seed}").shuffle(disputes)  # an order that tells nothing
    queue = [make_place(item, [system]) for item, system in disputes]
    header = make_header(assessor, recipe.seed, role="adjudicate")
    session = Session(run.path("assessment"), read_generations(run), queue, header)
    states = [(log.queue, State.replay(log).items) for log in logs]

    def find_opinions(item: Item) -> list[tuple[str, ItemState]]:
        place = session.log.queue[item.place]
        asked = (place["item_id"], place["systems"])
        return [
            (f"Assessor {chr(65 + n)}", state)
            for n, (queue, items) in enumerate(states)
            for line, state in zip(queue, items, strict=True)
            if (line["item_id"], line["systems"]) == asked
            and line["repeat_of"] is None
            and state.done
        ]

    return session, find_opinions
