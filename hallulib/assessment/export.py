"""The grades in other tools' formats: CSV, JSON Lines, Label Studio (https://labelstud.io/guide/tasks).

What to paste into Label Studio's "Labeling interface" is written beside its tasks.
System names are written only for sessions that have been unblinded; before, they are "sealed".
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd

from hallulib import files
from hallulib.assessment.analyse import Rows, tabulate
from hallulib.assessment.queue import split_sentences
from hallulib.errors import SessionError
from hallulib.run import Run


def export_assessment(run: Run) -> dict[str, Path]:
    """Write every export into `assessment/export/`; file name -> path. Preferences between two
    summaries stand in the tables only. Raises SessionError where nothing has been graded."""
    _, grades = tabulate(run)
    if grades.empty:
        raise SessionError("No summary has been graded yet.", "Grade one in notebook 07.")
    for name in ("system", "other"):
        grades[name] = grades[name].where(grades["unblinded"], "sealed")
    rows = grades.astype(object).where(grades.notna(), None).to_dict("records")
    tasks = [make_task(row) for row in rows if row["mode"] == "single"]
    contents = {
        "grades.csv": write_csv(rows),
        "label_studio.json": json.dumps(tasks, indent=1, ensure_ascii=False),
        "label_studio.xml": Path(__file__).with_name("label_studio.xml").read_text("utf-8"),
    }
    folder = run.path("assessment/export")
    for name, content in contents.items():
        files.write_text_atomic(folder / name, content)
    files.write_jsonl(folder / "grades.jsonl", rows)
    return {name: folder / name for name in ("grades.jsonl", *contents)}


def write_csv(rows: Rows) -> str:
    """A table with one line per item and assessor; lists as text, source and summary left out."""
    table = pd.DataFrame(rows).drop(columns=["source", "summary"])
    table["labels"] = table["labels"].map(
        lambda labels: "; ".join(
            f"{sid} {g['verdict']} {g['type'] or ''}" for sid, g in labels.items()
        )
    )
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


def make_task(row: dict[str, Any]) -> dict[str, Any]:
    """A task with its annotation; every region carries its text, not only its offsets."""
    regions = []

    def add(region: str, name: str, kind: str, **value: Any) -> None:
        about = {"id": region, "from_name": name, "to_name": "summary", "type": kind}
        regions.append(about | {"value": value})

    spots = {s.sid: s for s in split_sentences(row["summary"])}
    for sid, label in row["labels"].items():
        if label["verdict"] == "hallucinated":
            spot = {name: getattr(spots[sid], name) for name in ("start", "end", "text")}
            add(sid, "error", "labels", **spot, labels=[label["type"] or "other"])
            if label["severity"]:
                add(sid, "severity", "choices", **spot, choices=[label["severity"]])
    if row["verdict"]:
        add("verdict", "verdict", "choices", choices=[row["verdict"]])
    if row["omissions"]:
        add("omissions", "omissions", "textarea", text=row["omissions"])
    if row["note"]:
        add("remark", "remark", "textarea", text=[row["note"]])
    done = {"was_cancelled": row["answer"] == "skip", "lead_time": row["seconds"]}
    names = ("summary", "item_id", "system", "session", "assessor")
    return {
        "data": {"note": row["source"]} | {name: row[name] for name in names},
        "annotations": [done | {"result": regions}],
    }
