"""MedHal: its schema, its layouts, its twins, and hundreds of thousands of rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_factory import TEMPLATE, make_text, medhal_record, open_run, write_jsonl

from hallulib.clinic import exchange_fact, make_notes, write_reference
from hallulib.data import prepare_data
from hallulib.data.schema import SPLITS
from hallulib.data.medhal import join_twins, stream_medhal_rows
from hallulib.errors import DataError
from hallulib.files import project_root

pytestmark = pytest.mark.unit
TASKS = ["summarisation", "information_extraction"]


def load(path, tasks=TASKS) -> tuple[list[dict], Counter, dict]:
    dropped, origin = Counter(), {}
    return list(stream_medhal_rows(str(path), TEMPLATE, dropped, tasks, origin)), dropped, origin


def test_none_the_word_none_and_empty_contexts_are_alike(tmp_path):
    contexts = [None, "None", "", "  ", "A note."]
    records = [medhal_record(id=str(i), context=c) for i, c in enumerate(contexts)]
    rows, dropped, _ = load(write_jsonl(tmp_path / "m.jsonl", records))
    assert [row["id"] for row in rows] == ["4"]
    assert dropped["no_context"] == 4


def test_a_factual_statement_is_a_reference_and_a_non_factual_one_a_rejected_side(tmp_path):
    records = [
        medhal_record(id="a"), medhal_record(id="b", label=False),
        medhal_record(id="c", source="medqa"), medhal_record(id="d", statement=" "),
    ]  # fmt: skip
    rows, dropped, _ = load(write_jsonl(tmp_path / "m.jsonl", records))
    sides = [(row["id"], row["reference"], row["rejected"]) for row in rows]
    assert sides == [("a", "A summary.", ""), ("b", "", "A summary.")]
    assert dropped == {"other_task": 1, "blank_statement": 1}


def test_the_task_filter_knows_the_four_tasks(tmp_path):
    sources = ["acm", "sumpubmed", "medqa", "medmcqa", "mednli", "clinic"]
    records = [medhal_record(id=source, source=source) for source in sources]
    path = write_jsonl(tmp_path / "m.jsonl", records)

    def ids(*tasks):
        return {row["id"] for row in load(path, tasks)[0]}

    assert ids(*TASKS) == {"acm", "sumpubmed", "clinic"}
    assert ids("information_extraction") == {"acm"}
    assert ids("question_answering") == {"medqa", "medmcqa"} and ids("inference") == {"mednli"}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_format_reads_the_same_and_never_the_explanation(tmp_path, ending):
    notes = [f'Note "{i}",\nline' for i in range(3)]
    records = [medhal_record(id=str(i), label=i != 1, context=n) for i, n in enumerate(notes)]
    path = tmp_path / f"m.{ending}"
    frame = pd.DataFrame(records)
    if ending == "csv":
        frame.to_csv(path, index=False)
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        write_jsonl(path, records)
    rows, _, _ = load(path)
    assert [(row["id"], bool(row["reference"])) for row in rows] == [
        ("0", True), ("1", False), ("2", True),
    ]  # fmt: skip
    assert rows[0]["context"] == 'Note "0",\nline'
    assert "LEAK" not in json.dumps(rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"label": "perhaps"}, "column 'label': 'perhaps'"), ({"label": None}, "column 'label': None"),
     ({"statement": None}, "column 'statement': None"), ({"source": 3}, "column 'source': 3"),
     ({"statement": "half \ud800"}, "column 'statement'.*lone surrogate")],
)  # fmt: skip
def test_a_bad_cell_is_named_by_file_row_and_column(tmp_path, changes, words):
    path = write_jsonl(tmp_path / "m.jsonl", [medhal_record(), medhal_record(id="2", **changes)])
    with pytest.raises(DataError, match=rf"m\.jsonl, row 2, {words}"):
        load(path)


# --- layouts of the hub ----------------------------------------------------------------------


def write_hub_folder(folder: Path, splits: dict[str, int], **more) -> Path:
    """A data set as it lies on the hub: data/<split>-00000-of-00001.parquet."""
    (folder / "data").mkdir(parents=True)
    for split, count in splits.items():
        records = [
            medhal_record(id=f"{split}{i}", context=f"{split} note {i}", **more)
            for i in range(count)
        ]
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        pd.DataFrame(records).to_parquet(path, index=False)
    return folder


@pytest.mark.parametrize(
    ("splits", "more"),
    [({"train": 5, "val": 2, "test": 1}, {}), ({"train": 8}, {"length": 7}),
     ({"train": 4, "validation": 2, "test": 2}, {})],
)  # fmt: skip
def test_splits_that_changed_over_time_are_recognised_and_reported(
    tmp_path, monkeypatch, splits, more
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows, _, origin = load(write_hub_folder(tmp_path / "hub", splits, **more))
    assert len(rows) == 8 and "LEAK" not in json.dumps(rows)
    assert origin["hub_splits"] == splits


def test_a_hub_table_of_another_schema_is_refused_with_its_columns(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    pd.DataFrame({"id": ["1"], "text": ["a"]}).to_parquet(tmp_path / "hub" / "train.parquet")
    with pytest.raises(DataError, match=r"hub, row 1: no column 'source' \(there are: id, text"):
        load(tmp_path / "hub")


def test_the_hub_is_read_at_the_pinned_commit_and_one_that_is_not_pinned_is_told(
    monkeypatch, capsys
):
    import datasets
    import huggingface_hub

    asked = []

    class Api:
        def dataset_info(self, name, revision):
            asked.append((name, revision))
            return type("Info", (), {"sha": "c0ffee"})

    def load_dataset(name, revision):
        asked.append((name, revision))
        return {"train": datasets.Dataset.from_list([medhal_record()])}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commit = "0123456789" * 4
    assert load(f"GM07/medhal@{commit}")[2]["revision"] == commit
    assert asked == [("GM07/medhal", commit)]  # a pinned commit asks nothing of the network
    assert load("GM07/medhal@v2")[2]["revision"] == "c0ffee"
    assert asked[1:] == [("GM07/medhal", "v2"), ("GM07/medhal", "c0ffee")]
    assert "pin it with data.path=GM07/medhal@c0ffee" in capsys.readouterr().out


# --- twins -----------------------------------------------------------------------------------


def twin_row(row_id, text, factual, context="note", inner="g"):
    sides = {"reference": text, "rejected": ""} if factual else {"reference": "", "rejected": text}
    return {"id": row_id, "context": context, "inner_id": inner} | sides


def test_a_twin_shares_inner_id_and_context_and_most_words():
    rows = [
        twin_row("1", "takes aspirin 75 mg daily", True), twin_row("2", "is 40 years old", True),
        twin_row("3", "is 60 years old", False), twin_row("4", "takes aspirin 750 mg daily", False),
        twin_row("5", "takes aspirin 75 g daily", False, context="other note"),
        twin_row("6", "takes aspirin 75 g daily", False, inner="other"),
    ]  # fmt: skip
    dropped = Counter()
    joined = {row["id"]: row["rejected"] for row in join_twins(rows, dropped)}
    assert joined == {"1": "takes aspirin 750 mg daily", "2": "is 60 years old"}
    assert dropped == {"not_factual_twin": 2, "not_factual_without_twin": 2}


def test_a_false_statement_is_used_once_and_never_equals_the_true_one():
    rows = [
        twin_row("1", "has fever", True), twin_row("2", "has a fever", True),
        twin_row("3", "has fever", False), twin_row("4", "has no fever", False),
    ]  # fmt: skip
    joined = {row["id"]: row["rejected"] for row in join_twins(rows, Counter())}
    assert joined == {"1": "has no fever", "2": "has fever"}


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


# --- as a stage ------------------------------------------------------------------------------


def test_the_audit_tells_the_splits_that_the_hub_has(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_hub_folder(tmp_path / "hub", {"train": 90, "val": 20, "test": 20})
    recipe, run = open_run(tmp_path, source="medhal", path=str(folder))
    result = prepare_data(recipe, run)
    assert result.audit["hub_splits"] == {"train": 90, "val": 20, "test": 20}
    assert set(result.audit["splits"]) == set(SPLITS)


def test_medhal_becomes_splits_with_twins_and_every_row_is_accounted_for(tmp_path):
    records = []
    for i in range(150):
        shared = {"context": f"{make_text(i)} for patient {i}", "inner_id": str(i)}
        records.append(medhal_record(id=f"{i}t", statement=f"Dose {i} mg.", **shared))
        wrong = medhal_record(id=f"{i}f", statement=f"Dose {i} g.", label=False, **shared)
        records.append(wrong | {"explanation": f"LEAK it is {i} mg"})
    records.append(medhal_record(id="q", source="medqa", context="None"))
    path = write_jsonl(tmp_path / "m.jsonl", records)
    recipe, run = open_run(tmp_path, source="medhal", path=str(path))
    result = prepare_data(recipe, run)
    rows = [row for name in SPLITS for row in result.read(name)]
    dropped = result.audit["dropped"]
    assert len(records) == len(rows) + sum(dropped.values())
    assert dropped["other_task"] == 1 and dropped["beyond_the_sizes"] > 50
    assert all(row["rejected"] == row["reference"].replace(" mg", " g") for row in rows)
    assert not any("LEAK" in row["prompt"] or "Dose" in row["prompt"] for row in rows)
    assert result.audit["splits"]["train"]["length_bias"]["pairs"] == result.counts["train"]


def test_300_000_rows_cost_no_more_memory_than_30_000(tmp_path):
    words = "the patient was seen in clinic with chest pain and was given aspirin daily ".split()
    filler = " ".join(words * 15)

    def write(path, count):
        schema = pa.table({k: [v] for k, v in medhal_record().items()}).schema
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, count, 10_000):
                ids = range(start, start + 10_000)
                columns = {k: [v] * 10_000 for k, v in medhal_record().items()}
                columns |= {"id": [str(i) for i in ids], "inner_id": [str(i // 2) for i in ids]}
                columns |= {"context": [f"{filler} Number {i // 2}." for i in ids]}
                columns |= {"label": [i % 2 == 0 for i in ids]}
                writer.write_table(pa.table(columns))
        return path

    code = (
        "import resource, sys; from collections import Counter\n"
        "from hallulib.data.medhal import stream_medhal_rows\n"
        "from hallulib.data.splits import draw_rows\n"
        "for path in sys.argv[1:]:\n"
        "    d = Counter(); tasks = ['information_extraction']\n"
        "    rows = stream_medhal_rows(path, '{context}', d, tasks, {})\n"
        "    r = draw_rows(rows, {'train': 800, 'validation': 100, 'test': 100}, 0, d)\n"
        "    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    print(peak if sys.platform == 'linux' else peak // 1024, len(r) + sum(d.values()))"
    )
    paths = write(tmp_path / "small.parquet", 30_000), write(tmp_path / "large.parquet", 300_000)
    command = [sys.executable, "-c", code, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, few, large, many = map(int, done.stdout.split())
    assert (few, many) == (30_000, 300_000)
    assert 300_000 * len(filler) / 1024 > 300_000  # KiB, if the rows were kept
    assert large - small < 100_000
