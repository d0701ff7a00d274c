"""MedHal's schema: `id, context, statement, label, explanation, inner_id, source, synthetic`.

label True means factual. `explanation` gives the label away, so it is never read into a row.
Variants: `GM07/medhal` (train, val, test), `-lf` (train only, one column more) and `-lf-bal`; the
splits have changed over time. Source: arXiv 2504.08596 and the data sets' cards.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from hallulib.data.files import ENDINGS, Record, read_records, read_text
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
LABELS = {"true": True, "1": True, "false": False, "0": False}  # a CSV writes them as text


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
    if path.lower().endswith(ENDINGS):
        records = read_records(resolve_path(path))
    else:  # all splits, whatever they are called; the rows stay in Arrow, on the disk
        splits, origin["revision"] = _load_hub(path)
        origin["hub_splits"] = {name: len(split) for name, split in splits.items()}
        records = enumerate(chain.from_iterable(splits.values()), start=1)
    for number, record in records:
        found = _read_record(record, f"{display_path(resolve_path(path))}, row {number}", sources)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            yield found | {"prompt": build_prompt(template, found["context"])}


def _load_hub(path: str) -> tuple[dict[str, Any], str]:
    """The splits of a folder or of a hub id, and the commit read ("" for a folder). A pinned
    one that was read before comes from the cache, without the network."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    name, _, revision = path.partition("@")
    try:
        if resolve_path(path).is_dir():
            return load_dataset(str(resolve_path(path))), ""
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            revision = HfApi().dataset_info(name, revision=revision or None).sha
            print(f"data: reading {name} at {revision}; pin it with data.path={name}@{revision}")
        return load_dataset(name, revision=revision), revision
    except Exception as error:  # datasets raises many kinds: offline, unknown, gated, malformed
        what = f"the data set {name!r} could not be loaded ({type(error).__name__}: {error})"
        raise DataError(what, "check name, revision and network, or give a local file") from error


def _read_record(record: Record, place: str, sources: set[str]) -> Row | str:
    """The row of a record, without its prompt, or why there is none."""
    if read_text(record, "source", place) not in sources:
        return "other_task"
    # None, 'None' and '' alike mean that there is no note
    context = "" if record.get("context", "") is None else read_text(record, "context", place)
    context, statement = context.strip(), read_text(record, "statement", place).strip()
    factual = LABELS.get(str(record.get("label")).strip().lower())
    if factual is None:
        what = f"{place}, column 'label': {record.get('label')!r} is neither true nor false"
        raise DataError(what, "label is True for a factual statement and False otherwise")
    if context in ("", "None"):
        return "no_context"
    if not statement:
        return "blank_statement"
    return make_row(
        id=read_text(record, "id", place), group_id=hash_context(context), context=context,
        source=record["source"], inner_id=read_text(record, "inner_id", place),
        **{"reference" if factual else "rejected": statement},
    )  # fmt: skip


def join_twins(rows: Iterable[Row], dropped: Counter[str]) -> list[Row]:
    """Give each factual row its non-factual twin as `rejected`: same inner_id, same context.

    Where there are several, those are matched first that share most words. What is left over
    among the non-factual is counted in `dropped`, and the rows keep their order.
    """
    factual: list[Row] = []
    others: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        family = others[row["group_id"], row["inner_id"]]
        (factual if row["reference"] else family).append(row)
    matches = sorted(
        (-_measure_overlap(row["reference"], other["rejected"]), row["id"], other["id"])
        for row in factual
        for other in others[row["group_id"], row["inner_id"]]
        if row["reference"] != other["rejected"]
    )
    statements = {other["id"]: other["rejected"] for family in others.values() for other in family}
    twins: dict[str, str] = {}
    for _, row_id, other_id in matches:
        if row_id not in twins and other_id in statements:
            twins[row_id] = statements.pop(other_id)
    dropped["not_factual_twin"] += len(twins)
    dropped["not_factual_without_twin"] += len(statements)
    return [row | {"rejected": twins.get(row["id"], "")} for row in factual]


def _measure_overlap(a: str, b: str) -> float:
    left, right = set(a.lower().split()), set(b.lower().split())
    return len(left & right) / len(left | right)
