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
from hallulib.assessment.grades import Rows, tabulate
from hallulib.assessment.queue import split_sentences
from hallulib.assessment.session import read_generations
from hallulib.errors import SessionError
from hallulib.run import Run


def export_assessment(run: Run) -> dict[str, Path]:
    """Write every export into `assessment/export/`; file name -> path. Preferences between two
    summaries stand in the tables only. Raises SessionError where nothing has been graded."""
    _, grades = tabulate(run)
    if grades.empty:
        raise SessionError("No summary has been graded yet.", "Grade one in notebook 07.")
    grades = grades.astype(object).where(grades.notna(), None)
    texts = read_generations(run)
    rows = [
        add_texts(row, texts[row["item_id"], row["system"]]) for row in grades.to_dict("records")
    ]
    people = sorted({row["assessor_id"] for row in rows})
    tasks = [
        make_task(row, people.index(row["assessor_id"]) + 1)
        for row in rows if row["mode"] == "single"
    ]  # fmt: skip
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


def add_texts(row: dict[str, Any], generated: dict[str, Any]) -> dict[str, Any]:
    """A grade with its note, its summary (of a pair the left one), and where each sentence stands."""
    spots = {spot.sid: spot._asdict() for spot in split_sentences(generated["text"])}
    labels = [spots[sid] | label for sid, label in row["labels"].items()]
    row |= {"source": generated["context"], "summary": generated["text"], "labels": labels}
    return row if row.pop("unblinded") else row | {"system": "sealed", "other": "sealed"}


def write_csv(rows: Rows) -> str:
    """A table with one line per item and assessor; lists as text, source and summary left out."""
    table = pd.DataFrame(rows).drop(columns=["source", "summary"])
    table["labels"] = [
        "; ".join(f"{label['sid']} {label['verdict']} {label['type'] or ''}" for label in labels)
        for labels in table["labels"]
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


def make_task(row: dict[str, Any], person: int) -> dict[str, Any]:
    """A task with its annotation; every region carries its text, not only its offsets."""
    found = []  # id, name of the control, its type, value
    for label in row["labels"]:
        if label["verdict"] == "hallucinated":
            spot = {name: label[name] for name in ("start", "end", "text")}
            kind, severity = {"labels": [label["type"] or "other"]}, label["severity"]
            found.append((label["sid"], "error", "labels", spot | kind))
            if severity:
                found.append((label["sid"], "severity", "choices", spot | {"choices": [severity]}))
    if row["verdict"]:
        found.append(("verdict", "verdict", "choices", {"choices": [row["verdict"]]}))
    for name, texts in (("omissions", row["omissions"]), ("remark", [row["note"]])):
        if any(texts):
            found.append((name, name, "textarea", {"text": texts}))
    names = ("id", "from_name", "type", "value")
    return {
        "data": {name: row[name] for name in ("summary", "item_id", "system", "session")}
        | {"note": row["source"]},
        "annotations": [{
            "completed_by": person,
            "was_cancelled": row["answer"] == "skip",
            "lead_time": row["seconds"],
            "result": [dict(zip(names, region, strict=True), to_name="summary") for region in found],
        }],
    }  # fmt: skip
