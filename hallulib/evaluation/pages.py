"""The report, the model card and one item side by side, filled from the run's files only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hallulib.detectors.tokens import find_sentences
from hallulib.errors import DataError
from hallulib.evaluation.highlight import highlight_statements
from hallulib.evaluation.metrics import PRIMARY, find_changed_items
from hallulib.evaluation.sentences import headline_rows, load_templates, result_sentences
from hallulib.files import display_path, read_jsonl, resolve_path, write_text_atomic
from hallulib.recipe import Recipe
from hallulib.run import Run

SHOWN = {"fixed": 3, "broken": 3, "both_bad": 2}  # items of each kind that are shown in full
Row = dict[str, Any]


def write_report(
    path: Path, summary: dict[str, Any], records: Sequence[Row], generations: Sequence[Row]
) -> None:
    """Write the evaluation and what DPO changed on one HTML page: no script, nothing fetched."""
    changed, rows = find_changed_items(records, "sft", "dpo"), merge_rows(generations, records)
    items = [
        (kind, show_item(rows["sft", item], rows["dpo", item]))
        for kind, count in SHOWN.items()
        for item in changed[kind][:count]
    ]
    text = load_templates().get_template("report.html.j2").render(
        summary=summary, changed=changed, items=items,
        headline=headline_rows(summary), said=result_sentences(summary),
    )  # fmt: skip
    write_text_atomic(path, text)


def merge_rows(*tables: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """(system, id) -> what generations.jsonl and evaluation.jsonl say of this summary."""
    merged: dict[tuple[str, str], Row] = {}
    for row in (row for table in tables for row in table):
        key = (row["system"], row["id"])
        merged[key] = merged.get(key, {}) | row
    return merged


def change_on_item(run: Run, item_id: str, before: str = "sft", after: str = "dpo") -> str:
    """HTML of what two systems wrote on one held-out item, side by side with their verdicts.

    Raises DataError for an id or system that was not evaluated, MissingArtifact before notebook 06.
    """
    paths = [run.require(f"evaluation/{name}.jsonl") for name in ("generations", "evaluation")]
    rows = merge_rows(*map(read_jsonl, paths))
    missing = [system for system in (before, after) if (system, item_id) not in rows]
    if missing:
        raise DataError(
            f"item {item_id!r} was not evaluated under {missing[0]!r}",
            "choose an id of evaluation.jsonl; find_changed_items lists them by what changed",
        )
    return show_item(rows[before, item_id], rows[after, item_id])


def show_item(before: Row, after: Row) -> str:
    """HTML of one item: its note, and both systems' rows (`merge_rows`) side by side with each
    statement marked, what the note says on the wrong ones, and what was left out."""
    note, sides = before["context"], []
    for side in (before, after):
        wrong = [s | {"said": say_evidence(note, s)} for s in side["statements"] if s["error_type"]]
        marked = highlight_statements(side["text"], side["statements"])
        sides.append(side | {"wrong": wrong, "marked": marked})
    template = load_templates().get_template("item.html.j2")
    return template.render(id=before["id"], note=highlight_statements(note, []), sides=sides)


def say_evidence(note: str, statement: Mapping[str, Any]) -> str:
    """What the note says on a statement: the sentences in which its evidence stands."""
    spans = statement.get("evidence_spans") or ()
    quotes = [
        f'"{note[start:end]}"'
        for start, end in find_sentences(note)
        if any(start < stop and begin < end for begin, stop in spans)
    ]
    if quotes:
        return "the note has " + " / ".join(quotes)
    return statement.get("evidence") or "the note says nothing on it"


def write_model_card(path: Path, recipe: Recipe, run: Run, summary: dict[str, Any]) -> None:
    """Write the card of the DPO adapter as Markdown with Hugging Face metadata. A local base model
    has no hub id; the card names its folder in the text alone."""
    folder = resolve_path(recipe.model.name_or_path)
    audit = json.loads(run.require("data/audit.json").read_text("utf-8"))
    text = load_templates().get_template("card.md.j2").render(
        recipe=recipe, summary=summary, rate=summary["systems"]["dpo"]["rates"][PRIMARY],
        is_local=folder.is_dir(),
        base=display_path(folder) if folder.is_dir() else recipe.model.name_or_path,
        splits=audit["splits"], stages=run.manifest["stages"],
        headline=headline_rows(summary), said=result_sentences(summary),
    )  # fmt: skip
    write_text_atomic(path, text)
