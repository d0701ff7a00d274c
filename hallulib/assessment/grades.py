"""Every session of a run as a tidy table of grades: which of them count, and what they disagree on.

The seal of a running session stays: the table is for sums, and the adjudicator sees letters.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from hallulib.assessment import queue
from hallulib.assessment.log import Log
from hallulib.assessment.session import SIMULATED, Session, make_header, read_generations
from hallulib.errors import SessionError
from hallulib.recipe import Recipe
from hallulib.run import Run

Rows = list[dict[str, Any]]
Opinions = Callable[[queue.Item], list[tuple[str, dict]]]  # (letter, that assessor's grade)


def list_sessions(run: Run) -> list[Path]:
    """The event files of a run."""
    return sorted(run.path("assessment").glob("*.events.jsonl"))


def tabulate(run: Run) -> tuple[Rows, pd.DataFrame]:
    """(a row per session, a row per item that was answered or skipped). The second leaves out
    sessions about other summaries than the run holds now, which are not `current`.

    Of a pair (mode ab) `system` stands left and `other` right, and `preference` is the answer.
    `first`: the place where an item came first; the rest as in the header and in `sum_up`.
    """
    texts, sessions, grades = read_generations(run), [], []
    for log in map(Log, list_sessions(run)):
        who = {"session": log.name, "unblinded": log.unblinded, **log.header}
        current = _is_current(log, texts)
        sessions.append(who | log.progress() | {"current": current, "torn_bytes": log.torn})
        for place, (line, said) in enumerate(zip(log.queue, log.items, strict=True)):
            if current and said["answer"]:
                first = place if line["repeat_of"] is None else line["repeat_of"]
                where = {"place": place, "first": first, "item_id": line["item_id"]}
                systems = {"system": line["systems"][0], "other": line["systems"][-1]}
                grades.append(who | where | systems | said)
    return sessions, pd.DataFrame(grades)


def _is_current(log: Log, texts: queue.Rows) -> bool:
    try:
        items = queue.fill_queue(log.queue, texts)
    except KeyError:
        return False
    return queue.hash_items(items) == log.header["items_sha256"]


def choose_sessions(sessions: Rows, mode: str = "") -> Rows:
    """Sessions with a grade, the fullest first: people's, or where no person graded, scripts'.

    One for each assessor (their fullest; of equally full ones the newest) and no adjudications.
    """
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
    """Verdicts and preferences at the first showing of an item."""
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

    Raises SessionError where fewer than two have graded the same summaries, or nothing is disputed.
    """
    sessions, grades = tabulate(run)
    chosen = [row["session"] for row in choose_sessions(sessions, "single")]
    disputes = find_disputes(spread(sessions, grades)) if chosen else []
    if not disputes:
        raise SessionError(
            f"{len(chosen)} assessor(s) have graded, and no summary has two different verdicts.",
            "Let a second assessor grade: open_session(run, recipe, assessor=...).",
        )
    random.Random(f"adjudicate-{recipe.seed}").shuffle(disputes)  # an order that tells nothing
    places = [queue.make_place(item, [system]) for item, system in disputes]
    header = make_header(assessor, recipe.seed, role="adjudicate")
    session = Session(run.path("assessment"), read_generations(run), places, header)
    first = choose_first(grades).set_index(["item_id", "system"]).sort_index()

    def find_opinions(item: queue.Item) -> list[tuple[str, dict]]:
        (system,) = session.log.queue[item.place]["systems"]
        given = {
            row["session"]: row for row in first.loc[[(item.item_id, system)]].to_dict("records")
        }
        return [(f"Assessor {chr(65 + n)}", given[s]) for n, s in enumerate(chosen) if s in given]

    return session, find_opinions
