"""The grades in other tools' formats: CSV, JSON Lines, Label Studio, Argilla, preference pairs.

System names are written only for sessions that have been unblinded; before, they are "sealed".
Formats: https://labelstud.io/guide/tasks and argilla.Record.to_dict (2.x).
"""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hallulib.assessment.events import ERROR_TYPES, SEVERITIES, Event, SentenceGrade
from hallulib.assessment.opening import read_generations
from hallulib.assessment.queue import Slotting, index_rows
from hallulib.assessment.records import GENERATIONS, SessionRecord, keep_current, read_sessions
from hallulib.errors import SessionError
from hallulib.files import write_text_atomic
from hallulib.run import Run

Row = dict[str, Any]
# What to paste into Label Studio's "Labeling interface", so that the import is understood.
LABEL_STUDIO_CONFIG = """<View>
  <Text name="note" value="$note"/>
  <Text name="summary" value="$summary"/>
  <Labels name="error" toName="summary">
{labels}
  </Labels>
  <Choices name="severity" toName="summary" perRegion="true">
{severities}
  </Choices>
  <Choices name="verdict" toName="summary">
    <Choice value="supported"/><Choice value="hallucinated"/><Choice value="unsure"/>
  </Choices>
  <TextArea name="omissions" toName="summary"/>
  <TextArea name="remark" toName="summary"/>
</View>
""".format(
    labels="\n".join(f'    <Label value="{name}"/>' for name in ERROR_TYPES),
    severities="\n".join(f'    <Choice value="{name}"/>' for name in SEVERITIES),
)


def export_assessment(run: Run) -> dict[str, Path]:
    """Write every export into `assessment/export/`; file name -> path. Preferences between two
    summaries stand in the tables only. Raises SessionError where nothing has been graded."""
    records = keep_current(read_sessions(run), run)
    texts = index_rows(read_generations(run.require(GENERATIONS)))
    rows = [row for record in records for row in collect_rows(record, texts)]
    if not rows:
        raise SessionError("No summary has been graded yet.", "Grade one in notebook 07.")
    folder, people = run.path("assessment/export"), sorted({row["assessor"] for row in rows})
    singles = [row for row in rows if row["preference"] is None]
    contents = {
        "grades.csv": write_csv(rows),
        "grades.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "label_studio.json": _dump(to_label_studio(singles, people)),
        "label_studio.xml": LABEL_STUDIO_CONFIG,
        "argilla.json": _dump(to_argilla(singles)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_text_atomic(folder / name, content)
    return {name: folder / name for name in contents}


def collect_rows(record: SessionRecord, texts: dict[tuple[str, str], Row]) -> list[Row]:
    """One row per graded summary, in queue order. A skipped one has verdict None; so has a pair of
    mode ab, whose row speaks of its first summary and has the `preference` (-2 to 2)."""
    rows = []
    for slotting, entry in zip(record.queue, record.state.entries, strict=True):
        preference = entry.preference.preference if entry.preference else None
        answered = entry.skipped or preference is not None
        for slot, grade in sorted(entry.grades.items()) or [(1, None)] * answered:
            place = (slotting.item_id, slotting.systems[slot - 1])
            rows.append(_describe(record, slotting, texts[place], slot, grade) | {
                "preference": preference, "note": entry.note, "flagged": entry.flagged,
                "skipped": entry.skipped, "seconds": entry.elapsed_ms / 1000,
            })  # fmt: skip
    return rows


def _describe(
    record: SessionRecord, slotting: Slotting, text: Row, slot: int, grade: Event | None
) -> Row:
    open_ = record.state.unblinded
    labels = [label.model_dump() for label in grade.labels] if grade else []
    return {
        "session_id": record.header.session_id,
        "assessor": record.header.assessor_id,
        "assessor_kind": record.header.assessor_kind,
        "role": record.header.role,
        "item_id": slotting.item_id,
        "system": slotting.systems[slot - 1] if open_ else "sealed",
        "is_repeat": slotting.repeat_of is not None,
        "verdict": grade.verdict if grade else None,
        "labels": labels,
        "omissions": [o.model_dump() for o in grade.omissions or ()] if grade else [],
        "suggested": bool(grade and grade.suggested),
        "source": text["context"],
        "summary": text["text"],
    }


def write_csv(rows: Sequence[Row]) -> str:
    """A table with one line per item and assessor; lists as text, source and summary left out."""
    out = io.StringIO()
    names = [name for name in rows[0] if name not in ("source", "summary")]
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        labels = [SentenceGrade(**label) for label in row["labels"]]
        flat = {
            "labels": "; ".join(f"{g.statement_id} {g.verdict} {g.type or ''}" for g in labels),
            "omissions": "; ".join(o["text"] for o in row["omissions"]),
        }
        writer.writerow({name: _defuse(value) for name, value in (row | flat).items()})
    return out.getvalue()


def to_label_studio(rows: Sequence[Row], people: Sequence[str]) -> list[Row]:
    """Tasks with annotations; every region carries its text, not only its offsets."""
    return [
        {
            "data": {"note": row["source"], "summary": row["summary"], "item_id": row["item_id"],
                     "system": row["system"], "session_id": row["session_id"]},
            "annotations": [{
                "completed_by": people.index(row["assessor"]) + 1,
                "was_cancelled": row["skipped"],
                "lead_time": row["seconds"],
                "result": _label_studio_result(row),
            }],
        }
        for row in rows
    ]  # fmt: skip


def _label_studio_result(row: Row) -> list[Row]:
    def region(name: str, kind: str, value: Row, **more: str) -> Row:
        return {"from_name": name, "to_name": "summary", "type": kind, "value": value} | more

    found = []
    for label in row["labels"]:
        if label["verdict"] == "hallucinated":
            place = {key: label[key] for key in ("start", "end", "text")}
            kind = {"labels": [label["type"] or "other"]}
            found.append(region("error", "labels", place | kind, id=label["statement_id"]))
            if label["severity"]:
                severity = place | {"choices": [label["severity"]]}
                found.append(region("severity", "choices", severity, id=label["statement_id"]))
    if row["verdict"]:
        found.append(region("verdict", "choices", {"choices": [row["verdict"]]}, id="verdict"))
    for name, texts in (("omissions", [o["text"] for o in row["omissions"]]),
                        ("remark", [row["note"]] if row["note"] else [])):  # fmt: skip
        if texts:
            found.append(region(name, "textarea", {"text": texts}, id=name))
    return found


def to_argilla(rows: Sequence[Row]) -> list[Row]:
    """Records as `argilla.Record.from_dict` reads them, one per summary, a response per assessor.

    Argilla knows a user by a UUID: here one made of the assessor's name, which `metadata` holds.
    """
    return [
        {
            "id": f"{row['session_id']}-{number}",
            "fields": {"note": row["source"], "summary": row["summary"]},
            "metadata": {"item_id": row["item_id"], "assessor": row["assessor"]},
            "suggestions": {},
            "responses": _argilla_responses(row),
            "vectors": {},
        }
        for number, row in enumerate(rows)
    ]


def _argilla_responses(row: Row) -> Row:
    spans = [
        {"start": label["start"], "end": label["end"], "label": label["type"] or "other"}
        for label in row["labels"]
        if label["verdict"] == "hallucinated"
    ]
    answers = {"verdict": row["verdict"], "errors": spans, "remark": row["note"]}
    user = str(uuid.uuid5(uuid.NAMESPACE_URL, f"assessor:{row['assessor']}"))
    return {
        name: [{"value": value, "user_id": user, "status": "submitted"}]
        for name, value in answers.items()
        if value
    }


def make_preference_pairs(run: Run, held_out: Iterable[str]) -> list[Row]:
    """{prompt, chosen, rejected} for DPO from the preferences of mode ab; ties give none.

    held_out: ids and group ids of the test split. Raises SessionError when a graded item is one of
    them: a test item that becomes a training pair makes every later figure worthless.
    """
    texts = index_rows(read_generations(run.require(GENERATIONS)))
    held_out, pairs = set(held_out), []
    for record in keep_current(read_sessions(run), run):
        for slotting, entry in zip(record.queue, record.state.entries, strict=True):
            value = entry.preference.preference if entry.preference and entry.done else 0
            if record.header.mode != "ab" or value == 0 or slotting.repeat_of is not None:
                continue
            sides = [texts[slotting.item_id, system] for system in slotting.systems]
            chosen, rejected = sides if value < 0 else reversed(sides)
            if {slotting.item_id, chosen.get("group_id")} & held_out:
                raise SessionError(
                    f"'{slotting.item_id}' is of the test split; it must not become a training "
                    "pair.", "Collect preferences on training notes.",
                )  # fmt: skip
            pairs.append({
                "id": slotting.item_id, "prompt": chosen["prompt"], "chosen": chosen["text"],
                "rejected": rejected["text"], "origin": record.header.assessor_kind,
            })  # fmt: skip
    return pairs


def _defuse(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula, made harmless by a leading quote."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t" and value else value


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
