"""The data stage: any source -> three splits of one schema, and an audit of what is in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hallulib.clinic.export import export_medhal_rows
from hallulib.clinic.notes import Note, make_notes
from hallulib.clinic.styles import HELD_OUT_STYLE, SEEN_STYLES
from hallulib.data.audit import audit_references, audit_splits, refuse_cut_rows
from hallulib.data.medhal import join_twins, stream_medhal_rows
from hallulib.data.near_duplicates import merge_near_duplicates
from hallulib.data.own import stream_own_rows
from hallulib.data.schema import SPLITS, read_rows, write_rows
from hallulib.data.splits import draw_rows, split_rows
from hallulib.errors import DataError
from hallulib.files import resolve_path, write_json_atomic, write_text_atomic
from hallulib.models import load_tokenizer
from hallulib.recipe import Recipe
from hallulib.recipe_sections import DataSection
from hallulib.run import Run
from hallulib.stage import stage

Splits = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class DataResult:
    """What the data stage wrote: rows per split, and the audit."""

    folder: Path
    counts: dict[str, int]
    audit: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)

    def read(self, split: str) -> list[dict[str, str]]:
        """The rows of one split ("train", "validation", "test")."""
        return read_rows(self.folder / f"{split}.parquet")


def load_data_result(run: Run) -> DataResult:
    """Read the result of a finished data stage. Raises MissingArtifact if there is none."""
    audit = json.loads(run.require("data/audit.json").read_text("utf-8"))
    counts = {name: part["rows"] for name, part in audit["splits"].items()}
    return DataResult(run.path("data"), counts, audit)


@stage("data", load=load_data_result)
def prepare_data(recipe: Recipe, run: Run) -> DataResult:
    """Write data/{train,validation,test}.parquet and data/audit.json.

    Sources: the clinic world (in MedHal's schema), MedHal itself, or the user's own file.
    Raises DataError naming file, row, column and the next step; also, once the audit is written,
    when more rows than data.max_cut_share exceed model.max_length.
    """
    splits, origin = load_splits(recipe, run)
    audit = {"source": recipe.data.source, "path": recipe.data.path} | origin
    near = recipe.data.near_duplicates
    audit |= audit_splits(splits, load_tokenizer(recipe), recipe.model.max_length, near)
    audit["references"] = audit_references(splits["train"])
    if audit["leaks"]["groups"]:
        raise DataError(
            f"the group {audit['leaks']['groups'][0]!r} stands in more than one split",
            "give every document or patient one group_id",
        )
    write_json_atomic(run.path("data/audit.json"), audit)
    refuse_cut_rows(audit, recipe.data.max_cut_share)
    for name in SPLITS:
        write_rows(run.path(f"data/{name}.parquet"), splits[name])
    counts = {name: len(splits[name]) for name in SPLITS}
    return DataResult(run.path("data"), counts, audit, notes={"rows": counts} | origin)


def load_splits(recipe: Recipe, run: Run) -> tuple[Splits, dict[str, Any]]:
    """Return (split -> rows, where they are from) of the recipe's source.

    The second is {dropped: reason -> count, merged_groups, largest_group} and, from the hub,
    {revision, hub_splits}.
    """
    data = recipe.data
    _check_source(data)
    if data.source == "clinic":
        return make_clinic_splits(recipe, run.path("data/medhal"))
    dropped: Counter[str] = Counter()
    origin: dict[str, Any] = {}
    sizes = {name: getattr(data, f"{name}_size") for name in SPLITS}
    rows = _leave_out_long_rows(_stream_rows(data, dropped, origin), data.max_chars, dropped)
    drawn = draw_rows(rows, sizes, recipe.seed, dropped)
    if data.source == "medhal":
        drawn = join_twins(drawn, dropped)
    if not drawn:
        raise DataError(
            f"{data.path} has no row that can be used: {dict(+dropped)}",
            "look at data.tasks, data.max_chars and the file",
        )
    if data.near_duplicates:
        drawn, merged = merge_near_duplicates(drawn, data.near_duplicates)
        origin |= merged
    splits = split_rows(drawn, sizes, recipe.seed)
    dropped["beyond_the_sizes"] += len(drawn) - sum(map(len, splits.values()))
    return splits, origin | {"dropped": dict(+dropped)}


def _check_source(data: DataSection) -> None:
    """Raise DataError where a setting would be passed over in silence, or a path is missing."""
    if data.source != "file" and (data.columns or data.encoding != "auto"):
        raise DataError(
            f"data.columns and data.encoding are for your own file, and data.source is "
            f"{data.source!r}",
            "set data.source=file, or leave them out",
        )
    if data.source != "clinic" and not data.path:
        raise DataError(
            f"data.source is {data.source!r}, but data.path is empty",
            "set data.path to a .csv, .jsonl or .parquet file"
            + (" or to a hub id such as GM07/medhal" if data.source == "medhal" else ""),
        )


def _stream_rows(
    data: DataSection, dropped: Counter[str], origin: dict[str, Any]
) -> Iterator[dict[str, str]]:
    template = data.prompt_template
    if data.source == "medhal":
        return stream_medhal_rows(data.path, template, data.tasks, dropped, origin)
    path = resolve_path(data.path)
    return stream_own_rows(path, template, data.columns, data.encoding, dropped)


def _leave_out_long_rows(
    rows: Iterable[dict[str, str]], max_chars: int, dropped: Counter[str]
) -> Iterator[dict[str, str]]:
    for row in rows:
        if max_chars and len(row["prompt"]) > max_chars:
            dropped["longer_than_max_chars"] += 1
        else:
            yield row


def make_clinic_splits(recipe: Recipe, folder: Path) -> tuple[Splits, dict[str, Any]]:
    """Make the clinic notes, write them in MedHal's schema, and read them as MedHal is read.

    A reference is labelled True: its author knew the patient, so all of it is true. Whether the
    note says so is another question, and that gap is what this course is about. Half of the test
    notes are in the style that no other split has.
    """
    splits: Splits = {}
    dropped: Counter[str] = Counter()
    for name in SPLITS:
        notes = make_split_notes(recipe, name)
        path = folder / f"{name}.jsonl"
        records = export_medhal_rows(notes, recipe.seed, recipe.data.reference_fill_rate)
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, "\n".join(lines) + "\n")
        template = recipe.data.prompt_template
        found = stream_medhal_rows(str(path), template, ["summarisation"], dropped, {})
        rows = join_twins(found, dropped)
        by_text = {note.text.strip(): note for note in notes}
        splits[name] = [_add_facts(row, by_text[row["context"]], name) for row in rows]
    return splits, {"dropped": dict(+dropped)}


def make_split_notes(recipe: Recipe, split: str) -> list[Note]:
    """The notes of one split; the prefix keeps their ids, and so their random draws, apart."""
    data, seed = recipe.data, recipe.seed
    size = getattr(data, f"{split}_size")
    if split != "test":
        return make_notes(size, seed, SEEN_STYLES, data.missing_rate, prefix=split)
    held_out = size // 2
    return [
        *make_notes(size - held_out, seed, SEEN_STYLES, data.missing_rate, prefix="test-seen"),
        *make_notes(held_out, seed, [HELD_OUT_STYLE], data.missing_rate, prefix="test-held-out"),
    ]


def _add_facts(row: dict[str, str], note: Note, split: str) -> dict[str, str]:
    """MedHal has no column for facts and style; the clinic adds them to the row it made."""
    facts = note.facts | {"distractors": note.distractors}
    return row | {
        "id": note.id, "group_id": note.group_id, "split": split, "style": note.style,
        "style_group": "held_out" if note.style == HELD_OUT_STYLE else "seen",
        "facts": json.dumps(facts, ensure_ascii=False),
    }  # fmt: skip
