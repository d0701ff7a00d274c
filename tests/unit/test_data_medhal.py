"""MedHal: its schema, its layouts, its twins, and hundreds of thousands of rows."""

import json
import subprocess
import sys
from collections import Counter

import datasets
import huggingface_hub
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_factory import TEMPLATE, make_text, open_run, write_jsonl

from hallulib.clinic import exchange_fact, make_notes, write_reference
from hallulib.data import join_twins, prepare_data, stream_medhal_rows
from hallulib.data.schema import SPLITS
from hallulib.errors import DataError
from hallulib.files import project_root

pytestmark = pytest.mark.unit
TASKS = ["summarisation", "information_extraction", "question_answering", "inference"]


def record(**changes) -> dict:
    return {
        "id": "1", "context": "A note.", "statement": "A summary.", "label": True,
        "explanation": "LEAK The statement is factual.", "inner_id": "g1", "source": "acm",
        "synthetic": False,
    } | changes  # fmt: skip


def load(path, tasks=TASKS[:2]) -> tuple[list[dict], Counter, dict]:
    dropped, origin = Counter(), {}
    return list(stream_medhal_rows(str(path), TEMPLATE, dropped, tasks, origin)), dropped, origin


def test_statements_become_references_or_rejected_sides_and_what_is_left_out_is_counted(tmp_path):
    records = [record(id=str(i), context=c) for i, c in enumerate([None, "None", "", "  "])]
    records += [record(id="a"), record(id="b", label=False)]
    records += [record(id="c", source="medqa"), record(id="d", statement=" ")]
    rows, dropped, _ = load(write_jsonl(tmp_path / "m.jsonl", records))
    sides = [(row["id"], row["reference"], row["rejected"]) for row in rows]
    assert sides == [("a", "A summary.", ""), ("b", "", "A summary.")]
    assert dropped == {"other_task": 1, "blank_statement": 1, "no_context": 4}


def test_the_task_filter_knows_the_four_tasks(tmp_path):
    sources = ["acm", "sumpubmed", "medqa", "medmcqa", "mednli", "clinic"]
    path = write_jsonl(tmp_path / "m.jsonl", [record(id=name, source=name) for name in sources])
    ids = [{row["id"] for row in load(path, [task])[0]} for task in TASKS]
    assert ids == [{"sumpubmed", "clinic"}, {"acm"}, {"medqa", "medmcqa"}, {"mednli"}]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_format_reads_the_same_and_never_the_explanation(tmp_path, ending):
    records = [record(id=str(i), label=i != 1, context=f'"{i}",\nline') for i in range(3)]
    path, frame = tmp_path / f"m.{ending}", pd.DataFrame(records)
    if ending == "csv":
        frame.to_csv(path, index=False)
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        write_jsonl(path, records)
    rows, _, _ = load(path)
    assert [row["context"] for row in rows] == [f'"{i}",\nline' for i in range(3)]
    assert [bool(row["reference"]) for row in rows] == [True, False, True]
    assert "LEAK" not in json.dumps(rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"label": "perhaps"}, "column 'label': 'perhaps'"), ({"label": None}, "column 'label': None"),
     ({"statement": None}, "column 'statement': None"), ({"source": 3}, "column 'source': 3"),
     ({"statement": "half \ud800"}, r"column 'statement': 'half .ud800' is not text")],
)  # fmt: skip
def test_a_bad_cell_is_named_by_file_row_and_column(tmp_path, changes, words):
    path = write_jsonl(tmp_path / "m.jsonl", [record(), record(id="2", **changes)])
    with pytest.raises(DataError, match=rf"m\.jsonl, row 2, {words}"):
        load(path)


# --- layouts of the hub ----------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that lays a data set as on the hub: data/<split>-00000-of-00001.parquet."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def lay(splits: dict[str, int], **more):
        (tmp_path / "hub" / "data").mkdir(parents=True)
        for split, count in splits.items():
            path = tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"
            rows = [record(id=f"{split}{i}", context=f"{split} {i}", **more) for i in range(count)]
            pd.DataFrame(rows).to_parquet(path, index=False)
        return tmp_path / "hub"

    return lay


@pytest.mark.parametrize(
    ("splits", "more"),
    [({"train": 5, "val": 2, "test": 1}, {}), ({"train": 8}, {"length": 7}),
     ({"train": 4, "validation": 2, "test": 2}, {})],
)  # fmt: skip
def test_splits_that_changed_over_time_are_recognised_and_reported(hub, splits, more):
    rows, _, origin = load(hub(splits, **more))
    assert len(rows) == 8 and "LEAK" not in json.dumps(rows)
    assert origin["hub_splits"] == splits


def test_a_hub_table_of_another_schema_is_refused_with_its_columns(hub, tmp_path):
    path = hub({}) / "data" / "train-00000-of-00001.parquet"
    pd.DataFrame({"id": ["1"], "text": ["a"]}).to_parquet(path)
    with pytest.raises(DataError, match=r"hub, row 1: no column 'source' \(there are: id, text"):
        load(tmp_path / "hub")


def test_the_hub_is_read_at_the_pinned_commit_and_one_that_is_not_pinned_is_told(
    monkeypatch, capsys
):
    asked = []

    class Api:
        def dataset_info(self, name, revision):
            asked.append((name, revision))
            return type("Info", (), {"sha": "c0ffee"})

    def load_dataset(name, revision):
        asked.append((name, revision))
        return {"train": datasets.Dataset.from_list([record()])}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commit = "0123456789" * 4
    assert load(f"GM07/medhal@{commit}")[2]["revision"] == commit
    assert asked == [("GM07/medhal", commit)]  # a pinned commit asks nothing of the network
    assert load("GM07/medhal@v2")[2]["revision"] == "c0ffee"
    assert asked[1:] == [("GM07/medhal", "v2"), ("GM07/medhal", "c0ffee")]
    assert "pin it with data.path=GM07/medhal@c0ffee" in capsys.readouterr().out


def test_the_audit_tells_the_splits_that_the_hub_has(tmp_path, hub):
    splits = {"train": 90, "val": 20, "test": 20}
    result = prepare_data(*open_run(tmp_path, source="medhal", path=str(hub(splits))))
    assert result.audit["hub_splits"] == splits and set(result.audit["splits"]) == set(SPLITS)


# --- twins -----------------------------------------------------------------------------------


def join(*statements) -> tuple[dict[str, str], Counter]:
    """id -> its twin, of (text, factual[, context, inner_id]), and the counts."""
    rows, dropped = [], Counter()
    for i, (text, factual, *family) in enumerate(statements, start=1):
        context, inner = family or ("note", "g")
        sides = (text, "") if factual else ("", text)
        row = dict(zip(("reference", "rejected"), sides, strict=True))
        rows.append(row | {"id": str(i), "group_id": context, "inner_id": inner})
    return {row["id"]: row["rejected"] for row in join_twins(rows, dropped)}, dropped


def test_a_twin_shares_inner_id_and_context_and_most_words():
    joined, dropped = join(
        ("takes aspirin 75 mg daily", True), ("is 40 years old", True),
        ("is 60 years old", False), ("takes aspirin 750 mg daily", False),
        ("takes aspirin 75 g daily", False, "other", "g"),
        ("takes aspirin 75 g daily", False, "note", "other"),
    )  # fmt: skip
    assert joined == {"1": "takes aspirin 750 mg daily", "2": "is 60 years old"}
    assert dropped == {"not_factual_twin": 2, "not_factual_without_twin": 2}


def test_a_false_statement_is_used_once_and_never_equals_the_true_one():
    statements = [("has fever", True), ("has a fever", True), ("has fever", False)]
    assert join(*statements, ("has no fever", False))[0] == {"1": "has no fever", "2": "has fever"}


def test_the_sample_that_ships_is_read_as_notes_with_one_fact_exchanged_in_their_twins():
    rows, dropped, _ = load(project_root() / "data/samples/medhal.jsonl")
    joined = join_twins(rows, dropped)
    notes = make_notes(10, seed=0, missing_rate=0.2, prefix="sample")
    found = [(row["context"], row["reference"], row["rejected"]) for row in joined]
    assert found == [
        (note.text, write_reference(note, 0, 0.85), exchange_fact(note, 0)[0]) for note in notes
    ]
    assert dropped == {"not_factual_twin": 10, "not_factual_without_twin": 0}
    assert not any("explanation" in row or " in the note is " in str(row) for row in rows)


def test_medhal_becomes_splits_with_twins_and_every_row_is_accounted_for(tmp_path):
    records = [record(id="q", source="medqa", context="None")]
    for i in range(150):
        shared = {"context": f"{make_text(i)} for patient {i}", "inner_id": str(i)}
        records.append(record(id=f"{i}t", statement=f"Dose {i} mg.", **shared))
        records.append(record(id=f"{i}f", statement=f"Dose {i} g.", label=False, **shared))
    path = write_jsonl(tmp_path / "m.jsonl", records)
    result = prepare_data(*open_run(tmp_path, source="medhal", path=str(path)))
    rows = [row for name in SPLITS for row in result.read(name)]
    dropped = result.audit["dropped"]
    assert len(records) == len(rows) + sum(dropped.values())
    assert dropped["other_task"] == 1 and dropped["beyond_the_sizes"] > 50
    assert all(row["rejected"] == row["reference"].replace(" mg", " g") for row in rows)
    assert not any("LEAK" in row["prompt"] or "Dose" in row["prompt"] for row in rows)
    assert result.audit["splits"]["train"]["length_bias"]["pairs"] == result.counts["train"]


READ = """
import resource, sys
from collections import Counter
from hallulib.data.medhal import stream_medhal_rows
from hallulib.data.splits import draw_rows
for path in sys.argv[1:]:
    dropped = Counter()
    rows = stream_medhal_rows(path, "{context}", dropped, ["information_extraction"], {})
    drawn = draw_rows(rows, {"train": 800, "validation": 100, "test": 100}, 0, dropped)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak if sys.platform == "linux" else peak // 1024, len(drawn) + sum(dropped.values()))
"""


def test_300_000_rows_cost_no_more_memory_than_30_000(tmp_path):
    filler = "the patient was seen in clinic with chest pain and was given aspirin " * 15
    schema = pa.table({k: [v] for k, v in record().items()}).schema
    counts = (30_000, 300_000)
    for count in counts:
        with pq.ParquetWriter(tmp_path / f"{count}.parquet", schema) as writer:
            for start in range(0, count, 10_000):
                ids = range(start, start + 10_000)
                columns = {k: [v] * 10_000 for k, v in record().items()}
                columns |= {"id": [str(i) for i in ids], "inner_id": [str(i // 2) for i in ids]}
                columns |= {"context": [f"{filler} Number {i // 2}." for i in ids]}
                writer.write_table(pa.table(columns | {"label": [i % 2 == 0 for i in ids]}))
    command = [sys.executable, "-c", READ, *(str(tmp_path / f"{n}.parquet") for n in counts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, few, large, many = map(int, done.stdout.split())
    assert (few, many) == counts
    assert 300_000 * len(filler) / 1024 > 300_000  # KiB, if the rows were kept
    assert large - small < 100_000
