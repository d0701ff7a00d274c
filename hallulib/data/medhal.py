"""MedHal's schema: `id, context, statement, label, explanation, inner_id, source, synthetic`.

label True means factual. `explanation` gives the label away, so it is never read into a row.
Variants: `GM07/medhal` (train, val, test), `-lf` (train only, one column more) and `-lf-bal`; the
splits have changed over time. Source: arXiv 2504.08596 and the data sets' cards.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from hallulib.data.files import ENDINGS, Record, read_records, require_text
from hallulib.data.schema import Row, build_prompt, hash_context, make_row
from hallulib.errors import DataError
from hallulib.files import display_path, resolve_path

# MedHal's `source` tells the task. Only the first two have a note to write from.
TASKS = {
    "summarisation": ("sumpubmed", "clinic"),
    "information_extraction": ("acm",),
    "question_answering": ("medmcqa", "medqa"),
    "inference": ("mednli",),
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LABELS = {"true": True, "1": True, "false": False, "0": False}


def stream_medhal_rows(
    path: str, template: str, dropped: Counter[str], tasks: Iterable[str], origin: dict[str, Any]
) -> Iterator[Row]:
    """Yield rows, one at a time: of a factual statement the reference is the statement, its context
    the note. A non-factual one has no reference, and the statement as `rejected` (see join_twins).

    path: a local file, a folder in the hub's layout, or a hub id, with `@revision` where one is
    pinned ("GM07/medhal@<commit>"). Rows left out are counted in `dropped` by reason; `origin`
    learns the splits found and the revision. Raises DataError naming file, row and column.
    """
    sources = {source for task in tasks for source in TASKS[task]}
    is_file = path.lower().endswith(ENDINGS)
    records = read_records(resolve_path(path)) if is_file else _read_hub(path, origin)
    for number, record in records:
        place = f"{display_path(resolve_path(path))}, row {number}"
        if require_text(record, "source", place) not in sources:
            dropped["other_task"] += 1
            continue
        context = _read_context(record, place)
        statement = require_text(record, "statement", place).strip()
        factual = _read_label(record, place)
        if not context or not statement:
            dropped["blank_statement" if context else "no_context"] += 1
            continue
        yield make_row(
            id=require_text(record, "id", place), group_id=hash_context(context),
            source=record["source"], prompt=build_prompt(template, context), context=context,
            inner_id=require_text(record, "inner_id", place),
            **{"reference" if factual else "rejected": statement},
        )  # fmt: skip


def _read_hub(path: str, origin: dict[str, Any]) -> Iterator[tuple[int, Record]]:
    """All splits, whatever they are called: the group decides ours, and theirs may cut through one.

    The rows stay in Arrow on disk, so a million of them cost no memory.
    """
    splits, origin["revision"] = _load_hub(path)
    origin["hub_splits"] = {name: len(split) for name, split in splits.items()}
    number = 0
    for split in splits.values():
        for record in split:
            number += 1
            yield number, record


def _load_hub(path: str) -> tuple[dict[str, Any], str]:
    """The splits of a folder or of a hub id, and the commit that was read ("" for a folder).

    A pinned commit that was read before is read from the cache, without the network.
    """
    from datasets import load_dataset
    from huggingface_hub import HfApi

    folder = resolve_path(path)
    name, _, revision = path.partition("@")
    try:
        if folder.is_dir():
            return load_dataset(str(folder)), ""
        if not _COMMIT.fullmatch(revision):
            revision = HfApi().dataset_info(name, revision=revision or None).sha
            print(f"data: reading {name} at {revision}; pin it with data.path={name}@{revision}")
        return load_dataset(name, revision=revision), revision
    except Exception as error:  # datasets raises many kinds: offline, unknown, gated, malformed
        raise DataError(
            f"the data set {name!r} could not be loaded ({type(error).__name__}: {error})",
            "check the name, the revision and the network, or give a local .parquet, .csv or "
            ".jsonl file, or a folder of them, as data.path",
        ) from error


def _read_context(record: Record, place: str) -> str:
    """The note of a MedHal record; None, 'None' and '' alike mean that there is none ("")."""
    if record.get("context", "") is None:
        return ""
    context = require_text(record, "context", place).strip()
    return "" if context == "None" else context


def _read_label(record: Record, place: str) -> bool:
    """True = factual. A CSV writes the label as text, so 'True', 'false', '1' and '0' are read."""
    value = record.get("label")
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        raise DataError(
            f"{place}, column 'label': {value!r} is neither true nor false",
            "label is True for a factual statement and False otherwise",
        )
    return label


def join_twins(rows: Iterable[Row], dropped: Counter[str]) -> list[Row]:
    """Give each factual row its non-factual twin as `rejected`: same inner_id, same context.

    Where there are several, those are matched first that share most words. What is left over
    among the non-factual is counted in `dropped`, and the rows keep their order.
    """
    rows = list(rows)
    families: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        families[hash_context(row["context"]), row["inner_id"]].append(row)
    twins: dict[str, str] = {}
    for family in families.values():
        twins |= _match_twins(family)
    factual = [row for row in rows if row["reference"]]
    dropped["not_factual_twin"] += len(twins)
    dropped["not_factual_without_twin"] += len(rows) - len(factual) - len(twins)
    return [row | {"rejected": twins.get(row["id"], "")} for row in factual]


def _match_twins(family: list[Row]) -> dict[str, str]:
    """id of a factual row -> statement of its twin; each statement is used once."""
    shared = [
        (-_measure_overlap(a["reference"], b["rejected"]), a["id"], b["id"], b["rejected"])
        for a in family
        for b in family
        if a["reference"] and b["rejected"] and a["reference"] != b["rejected"]
    ]
    matched: dict[str, str] = {}
    used: set[str] = set()
    for _, true_id, false_id, statement in sorted(shared):
        if true_id not in matched and false_id not in used:
            matched[true_id] = statement
            used.add(false_id)
    return matched


def _measure_overlap(a: str, b: str) -> float:
    left, right = set(a.lower().split()), set(b.lower().split())
    return len(left & right) / len(left | right)
