"""The data stage: any source -> three splits of one schema, and an audit of what is in them."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from hallulib import clinic
from hallulib.data.audit import audit_references, audit_splits, refuse_cut_rows
from hallulib.data.medhal import join_twins, stream_medhal_rows
from hallulib.data.own import stream_own_rows
from hallulib.data.schema import COLUMNS, SPLITS, Row, build_prompt, make_row, read_rows
from hallulib.data.splits import draw_rows, merge_near_duplicates, split_rows
from hallulib.errors import DataError
from hallulib.files import display_path, resolve_path, write_json_atomic
from hallulib.models import load_tokenizer
from hallulib.recipe import Recipe
from hallulib.recipe_sections import DataSection
from hallulib.run import Run, stage


@dataclass(frozen=True)
class DataResult:
    """What the data stage wrote: rows per split, and the audit."""

    folder: Path
    counts: dict[str, int]
    audit: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)

    def read(self, split: str) -> list[Row]:
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

    Sources: the clinic world, MedHal, or the user's own file. Raises DataError naming file, row,
    column and the next step; also, once the audit is written, when more rows than
    data.max_cut_share exceed model.max_length.
    """
    data, length = recipe.data, recipe.model.max_length
    if data.source != "file" and (data.columns or data.encoding != "auto"):
        what = f"data.columns and data.encoding are for files, and data.source is {data.source!r}"
        raise DataError(what, "set data.source=file, or leave them out")
    if data.source == "clinic":
        splits, origin = make_clinic_splits(data, recipe.seed), {"dropped": {}}
    else:
        splits, origin = load_splits(data, recipe.seed)
    audit = {"source": data.source, "path": data.path} | origin
    audit |= audit_splits(splits, load_tokenizer(recipe), length, data.near_duplicates)
    audit["references"] = audit_references(splits["train"])
    write_json_atomic(run.path("data/audit.json"), audit)
    refuse_cut_rows(audit, data.max_cut_share)
    for name, rows in splits.items():
        table = pd.DataFrame(rows, columns=list(COLUMNS))
        table.to_parquet(run.path(f"data/{name}.parquet"), index=False)
    counts = {name: len(rows) for name, rows in splits.items()}
    return DataResult(run.path("data"), counts, audit, notes={"rows": counts} | origin)


def load_splits(data: DataSection, seed: int) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Return (split -> rows, where they are from: {dropped: reason -> count, merged_groups,
    largest_group} and, from the hub, {revision, hub_splits}) of MedHal or the user's own file."""
    if not data.path:
        raise DataError("data.path is empty", "set it to a .csv, .jsonl or .parquet file")
    dropped: Counter[str] = Counter()
    origin: dict[str, Any] = {}
    sizes = {name: getattr(data, f"{name}_size") for name in SPLITS}
    source = data.path, data.prompt_template, dropped
    if data.source == "medhal":
        rows = stream_medhal_rows(*source, data.tasks, origin)
    else:
        rows = stream_own_rows(*source, data.columns, data.encoding)
    drawn = draw_rows(_check_rows(rows, data, dropped), sizes, seed, dropped)
    if data.source == "medhal":
        drawn = join_twins(drawn, dropped)
    if not drawn:
        what = f"{data.path} has no row that can be used: {dict(+dropped)}"
        raise DataError(what, "look at data.tasks, data.max_chars and the file")
    if data.near_duplicates:
        drawn, merged = merge_near_duplicates(drawn, data.near_duplicates)
        origin |= merged
    splits = split_rows(drawn, sizes, seed)
    dropped["beyond_the_sizes"] += len(drawn) - sum(map(len, splits.values()))
    return splits, origin | {"dropped": dict(+dropped)}


def _check_rows(rows: Iterable[Row], data: DataSection, dropped: Counter[str]) -> Iterator[Row]:
    """Leave out rows longer than data.max_chars; refuse an id that occurs twice, because results
    join by id."""
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            what = f"{display_path(resolve_path(data.path))}: the id {row['id']!r} occurs twice"
            raise DataError(what, "give every row an id of its own, or leave the id column out")
        seen.add(row["id"])
        if data.max_chars and len(row["prompt"]) > data.max_chars:
            dropped["longer_than_max_chars"] += 1
        else:
            yield row


def make_clinic_splits(data: DataSection, seed: int) -> dict[str, list[Row]]:
    """Make the clinic's notes and their rows; half of the test notes are in the style that no other
    split has, and prefixes keep the ids, and so the random draws, apart."""
    held_out = data.test_size // 2
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for split, prefix, size, styles in (
        ("train", "train", data.train_size, clinic.SEEN_STYLES),
        ("validation", "validation", data.validation_size, clinic.SEEN_STYLES),
        ("test", "test-seen", data.test_size - held_out, clinic.SEEN_STYLES),
        ("test", "test-held-out", held_out, [clinic.HELD_OUT_STYLE]),
    ):
        notes = clinic.make_notes(size, seed, styles, data.missing_rate, prefix)
        splits[split] += [_make_clinic_row(note, data, seed) | {"split": split} for note in notes]
    return splits


def _make_clinic_row(note: clinic.Note, data: DataSection, seed: int) -> Row:
    """The row of a note, with the facts it was made from. All that its reference says is true of
    the patient; whether the note says so is the gap that this course is about."""
    return make_row(
        id=note.id, group_id=note.group_id, source="clinic", style=note.style, context=note.text,
        style_group="held_out" if note.style == clinic.HELD_OUT_STYLE else "seen",
        prompt=build_prompt(data.prompt_template, note.text),
        reference=clinic.write_reference(note, seed, data.reference_fill_rate),
        rejected=clinic.exchange_fact(note, seed)[0],
        facts=json.dumps(note.facts | {"distractors": note.distractors}, ensure_ascii=False),
    )  # fmt: skip
