"""The grades in other tools' formats: CSV, JSON Lines, Label Studio (https://labelstud.io/guide/tasks).

What to paste into Label Studio's "Labeling interface" is written beside its tasks.
System names are written only for sessions that have been unblinded; before, they are "sealed".
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from hallulib.assessment.analyse import keep_current, read_logs, tabulate
from hallulib.assessment.queue import split_sentences
from hallulib.assessment.session import read_generations
from hallulib.errors import SessionError
from hallulib.files import write_jsonl, write_text_atomic
from hallulib.run import Run

GRADED = {"verdict", "type", "severity"}


def export_assessment(run: Run) -> dict[str, Path]:
    """Write every export into `assessment/export/`; file name -> path. Preferences between two
    summaries stand in the tables only. Raises SessionError where nothing has been graded."""
    grades = tabulate(keep_current(read_logs(run), run))
    if grades.empty:
        raise SessionError("No summary has been graded yet.", "Grade one in notebook 07.")
    rows = add_texts(grades, run).to_dict("records")
    singles = [row for row in rows if row["mode"] == "single"]
    contents = {
        "grades.csv": write_csv(rows),
        "label_studio.json": json.dumps(to_label_studio(singles), indent=1, ensure_ascii=False),
        "label_studio.xml": Path(__file__).with_name("label_studio.xml").read_text("utf-8"),
    }
    folder = run.path("assessment/export")
    for name, content in contents.items():
        write_text_atomic(folder / name, content)
    write_jsonl(folder / "grades.jsonl", rows)
    return {name: folder / name for name in ("grades.jsonl", *contents)}


def add_texts(grades: pd.DataFrame, run: Run) -> pd.DataFrame:
    """The grades with `source`, `summary` (of a pair the left one) and the place of each sentence;
    sealed systems lose their names. A skipped item has no verdict."""
    texts = read_generations(run)
    rows = [texts[place] for place in zip(grades["item_id"], grades["system"], strict=True)]
    places = [{s.sid: s._asdict() for s in split_sentences(row["text"])} for row in rows]
    labels = [
        [found[label.sentence] | label.model_dump(include=GRADED) for label in own]
        for found, own in zip(places, grades["labels"], strict=True)
    ]
    grades = grades.assign(
        labels=labels,
        source=[row["context"] for row in rows], summary=[row["text"] for row in rows],
    )  # fmt: skip
    for name in ("system", "other"):
        grades[name] = grades[name].where(~grades["sealed"], "sealed")
    return grades.drop(columns=["sealed", "first"]).astype(object).where(grades.notna(), None)


def write_csv(rows: list[dict[str, Any]]) -> str:
    """A table with one line per item and assessor; lists as text, source and summary left out."""
    table = pd.DataFrame(rows).drop(columns=["source", "summary"])
    table["labels"] = [
        "; ".join(f"{g['sid']} {g['verdict']} {g['type'] or ''}" for g in row["labels"])
        for row in rows
    ]
    table["omissions"] = table["omissions"].map("; ".join)
    return table.map(defuse).to_csv(index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")


def defuse(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula, made harmless by a leading quote, whatever
    blanks, marks that are not seen, or wide forms of a sign it begins with."""
    if not isinstance(value, str):
        return value
    seen = (c for c in unicodedata.normalize("NFKC", value) if c.isprintable() and c != " ")
    text = re.sub(r"\r\n?", "\n", value)
    return f"'{text}" if next(seen, "") in tuple("=+-@") else text


def to_label_studio(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tasks with annotations; every region carries its text, not only its offsets."""
    people = sorted({row["assessor"] for row in rows})
    return [
        {
            "data": {"note": row["source"]}
            | {name: row[name] for name in ("summary", "item_id", "system", "session")},
            "annotations": [{
                "completed_by": people.index(row["assessor"]) + 1,
                "was_cancelled": row["skipped"],
                "lead_time": row["seconds"],
                "result": list(_list_regions(row)),
            }],
        }
        for row in rows
    ]  # fmt: skip


def _list_regions(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    def region(sid: str, name: str, kind: str, **value: Any) -> dict[str, Any]:
        return {"id": sid, "from_name": name, "to_name": "summary", "type": kind, "value": value}

    for label in row["labels"]:
        if label["verdict"] == "hallucinated":
            place = {name: label[name] for name in ("start", "end", "text")}
            kind = label["type"] or "other"
            yield region(label["sid"], "error", "labels", **place, labels=[kind])
            if label["severity"]:
                choice = [label["severity"]]
                yield region(label["sid"], "severity", "choices", **place, choices=choice)
    if row["verdict"]:
        yield region("verdict", "verdict", "choices", choices=[row["verdict"]])
    if row["omissions"]:
        yield region("omissions", "omissions", "textarea", text=row["omissions"])
    if row["note"]:
        yield region("remark", "remark", "textarea", text=[row["note"]])
