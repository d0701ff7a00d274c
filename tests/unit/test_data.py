"""Data: MedHal, the user's files and the clinic, into one schema, split by group, audited."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hallulib.clinic.base_model import build_tokenizer
from hallulib.clinic.notes import make_notes
from hallulib.clinic.styles import HELD_OUT_STYLE
from hallulib.data import COLUMNS, SPLITS, load_data_result, prepare_data, read_facts
from hallulib.data.audit import audit_splits
from hallulib.data.files import load_own_rows, read_records
from hallulib.data.medhal import load_medhal_rows, read_medhal
from hallulib.data.schema import build_prompt, hash_context, make_row
from hallulib.data.splits import choose_split, find_leaks, split_rows
from hallulib.errors import DataError
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit
REAL = Path(__file__).parents[3] / "shared" / "realdata"
TEMPLATE = "Summarise the note.\n\n{context}"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer(make_notes(60, seed=1), vocab_size=512).save_pretrained(folder)
    return folder


def open_run(tmp_path, tokenizer_dir, **data):
    sizes = {"train_size": 60, "validation_size": 12, "test_size": 21}
    model = {"name_or_path": str(tokenizer_dir)}
    recipe = load_recipe("tiny-cpu", {"model": model, "data": sizes | data})
    return recipe, Run.open(tmp_path / "run", recipe)


@pytest.fixture(scope="module")
def clinic(tmp_path_factory, tokenizer_dir):
    recipe, run = open_run(tmp_path_factory.mktemp("clinic"), tokenizer_dir)
    return recipe, run, prepare_data(recipe, run)


def write_file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def medhal_record(**changes) -> dict:
    return {
        "id": "1", "context": "A note.", "statement": "A summary.", "label": True,
        "explanation": "LEAK The statement is factual.", "inner_id": "g1", "source": "acm",
        "synthetic": False,
    } | changes  # fmt: skip


def write_jsonl(path: Path, records: list[dict]) -> Path:
    return write_file(path, "".join(json.dumps(record) + "\n" for record in records))


# --- the clinic -----------------------------------------------------------------------------


def test_the_clinic_fills_every_split_and_no_group_crosses_them(clinic):
    _, _, result = clinic
    splits = {name: result.read(name) for name in SPLITS}
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 60, "validation": 12, "test": 21,
    }  # fmt: skip
    assert find_leaks(splits, "group_id") == [] == find_leaks(splits, "context")
    assert all(row["split"] == name for name, rows in splits.items() for row in rows)
    assert all(tuple(row) == COLUMNS for rows in splits.values() for row in rows)


def test_the_held_out_style_is_in_half_of_the_test_notes_and_nowhere_else(clinic):
    _, _, result = clinic
    styles = {name: [row["style"] for row in result.read(name)] for name in SPLITS}
    assert HELD_OUT_STYLE not in styles["train"] + styles["validation"]
    assert styles["test"].count(HELD_OUT_STYLE) == 10
    groups = [row["style_group"] for row in result.read("test")]
    assert groups.count("held_out") == 10 and groups.count("seen") == 11


def test_no_prompt_holds_the_explanation_or_the_reference(clinic):
    _, run, result = clinic
    exported = [
        json.loads(line)
        for name in SPLITS
        for line in run.path(f"data/medhal/{name}.jsonl").read_text("utf-8").splitlines()
    ]
    explanations = {record["explanation"] for record in exported if record["explanation"]}
    assert len(explanations) > 50
    for name in SPLITS:
        for row in result.read(name):
            assert row["prompt"] == build_prompt(TEMPLATE, row["context"])
            assert row["reference"] not in row["prompt"]
            assert not any(text in row["prompt"] for text in explanations)


def test_references_state_what_the_note_does_not_and_the_audit_says_how_often(clinic):
    _, _, result = clinic
    share = result.audit["references"]["summary"]
    assert share["n"] == 60 and 0.4 < share["value"] < 0.95
    kinds = set(result.audit["references"]["by_kind"])
    assert kinds and kinds <= {"allergies", "family_history", "smoking", "follow_up"}
    references = result.audit["references"]
    assert references["in_reference"]["allergies"] > references["in_note"]["allergies"] > 0.5
    assert references["in_reference"]["age"] == references["in_note"]["age"] == 1
    row = result.read("train")[0]
    assert set(read_facts(row)) >= {"age", "sex", "distractors"}


def test_the_result_of_a_finished_stage_is_read_back_and_not_made_again(clinic, capsys):
    recipe, run, first = clinic
    again = prepare_data(recipe, run)
    assert "data: unchanged" in capsys.readouterr().out
    assert again.audit == json.loads(json.dumps(first.audit))
    assert load_data_result(run).counts == first.counts


def test_the_same_recipe_gives_the_same_rows_and_another_seed_gives_others(
    clinic, tmp_path, tokenizer_dir
):
    _, _, first = clinic
    recipe, run = open_run(tmp_path / "a", tokenizer_dir)
    assert prepare_data(recipe, run).read("test") == first.read("test")
    other = recipe.model_copy(update={"seed": 1})
    changed = prepare_data(other, Run.open(tmp_path / "b", other)).read("test")
    assert not {row["context"] for row in changed} & {row["context"] for row in first.read("test")}


# --- MedHal ---------------------------------------------------------------------------------


def test_medhal_none_the_word_none_and_empty_contexts_are_alike(tmp_path):
    contexts = [None, "None", "", "  ", "A note."]
    records = [medhal_record(id=str(i), context=c) for i, c in enumerate(contexts)]
    rows, dropped = load_medhal_rows(str(write_jsonl(tmp_path / "m.jsonl", records)), TEMPLATE)
    assert [row["id"] for row in rows] == ["4"]
    assert dropped["no_context"] == 4


def test_medhal_keeps_the_factual_summaries_and_counts_the_rest(tmp_path):
    records = [
        medhal_record(id="a"), medhal_record(id="b", label=False),
        medhal_record(id="c", source="medqa"), medhal_record(id="d", statement=" "),
        medhal_record(id="e", source="sumpubmed", context="Another note."),
    ]  # fmt: skip
    rows, dropped = load_medhal_rows(str(write_jsonl(tmp_path / "m.jsonl", records)), TEMPLATE)
    assert [row["id"] for row in rows] == ["a", "e"]
    assert dropped == {"not_factual": 1, "other_task": 1, "blank_statement": 1, "no_context": 0}
    assert rows[0]["reference"] == "A summary."
    assert rows[0]["group_id"] != rows[1]["group_id"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_medhal_reads_the_same_from_every_format_and_never_the_explanation(tmp_path, ending):
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
    rows, dropped = load_medhal_rows(str(path), TEMPLATE)
    assert [row["id"] for row in rows] == ["0", "2"] and dropped["not_factual"] == 1
    assert rows[0]["context"] == 'Note "0",\nline'
    assert "LEAK" not in json.dumps(rows)
    assert all("explanation" not in record for _, record in read_medhal(str(path)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"label": "perhaps"}, "column 'label': 'perhaps'"), ({"label": None}, "column 'label': None"),
     ({"statement": None}, "column 'statement': None"), ({"source": 3}, "column 'source': 3")],
)  # fmt: skip
def test_a_bad_medhal_cell_is_named_by_file_row_and_column(tmp_path, changes, words):
    path = write_jsonl(tmp_path / "m.jsonl", [medhal_record(), medhal_record(id="2", **changes)])
    with pytest.raises(DataError, match=rf"m\.jsonl, row 2, {words}"):
        load_medhal_rows(str(path), TEMPLATE)


# --- anybody's files ------------------------------------------------------------------------


def test_own_rows_come_from_context_or_prompt_columns(tmp_path):
    text = "context,reference\n\"A note, with\nlines\", Short. \nOther,Text\n"
    rows, _ = load_own_rows(write_file(tmp_path / "a.csv", "\ufeff" + text), TEMPLATE)
    assert rows[0]["prompt"] == "Summarise the note.\n\nA note, with\nlines"
    assert rows[0]["reference"] == "Short."
    path = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Do it.", "reference": "Done."}])
    ((row,), _) = load_own_rows(path, TEMPLATE)
    assert row["prompt"] == "Do it." and row["group_id"] == hash_context("do  IT.")


def test_blank_cells_of_own_rows_are_dropped_and_counted(tmp_path):
    path = write_file(tmp_path / "a.csv", "context,reference\nA,b\nB,\n ,c\n")
    rows, dropped = load_own_rows(path, TEMPLATE)
    assert len(rows) == 1
    assert dropped == {"blank_context": 1, "blank_reference": 1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "has no rows"),
        ("a.csv", "context,reference\n", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.csv", "text,summary\na,b\n", "row 1: no column 'context' .*text, summary"),
        ("a.csv", "context,reference\na,b\na,b,c\n", "row 2: more fields"),
        ("a.csv", "context,reference\na,b\na\n", "row 2: fewer fields"),
        ("a.jsonl", '{"context": "a", "reference": "b"}\n{"context": \n', "line 2: not JSON"),
        ("a.jsonl", '["a"]\n', "line 1: list, not an object"),
        ("a.jsonl", '{"context": null, "reference": "b"}\n', "row 1, column 'context': None"),
        ("a.jsonl", '{"context": NaN, "reference": "b"}\n', "row 1, column 'context': nan"),
        ("a.jsonl", '{"context": "a", "reference": 7}\n', "row 1, column 'reference': 7"),
        ("a.txt", "a", "is not a file this course reads"),
        ("a.parquet", "no parquet", "is not a parquet file"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path, name, content, words):
    with pytest.raises(DataError, match=words):
        load_own_rows(write_file(tmp_path / name, content), TEMPLATE)


def test_nan_in_parquet_a_missing_file_latin1_and_double_ids_are_refused(tmp_path):
    frame = pd.DataFrame({"context": ["a", None], "reference": ["b", "c"]})
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2, column 'context'"):
        load_own_rows(tmp_path / "a.parquet", TEMPLATE)
    with pytest.raises(DataError, match="there is no file"):
        load_own_rows(tmp_path / "none.csv", TEMPLATE)
    (tmp_path / "l.csv").write_bytes("context,reference\ncaf\xe9,b\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        load_own_rows(tmp_path / "l.csv", TEMPLATE)
    path = write_file(tmp_path / "d.csv", "id,context,reference\n1,a,b\n1,c,d\n")
    with pytest.raises(DataError, match="'1' occurs twice"):
        load_own_rows(path, TEMPLATE)


def test_a_template_without_a_place_for_the_note_is_refused():
    with pytest.raises(DataError, match="no place for the note"):
        build_prompt("Summarise.", "a note")
    assert build_prompt("{context} {x}", "{braces}") == "{braces} {x}"


def test_own_file_becomes_splits_through_the_stage(tmp_path, tokenizer_dir):
    records = [
        {"context": f"Note {i // 2}", "reference": f"Summary {i}", "explanation": "LEAK"}
        for i in range(200)
    ]
    path = write_jsonl(tmp_path / "own.jsonl", records)
    recipe, run = open_run(tmp_path, tokenizer_dir, source="file", path=str(path))
    result = prepare_data(recipe, run)
    splits = {name: result.read(name) for name in SPLITS}
    assert find_leaks(splits, "context") == []
    assert result.audit["references"] is None
    assert result.audit["splits"]["train"]["duplicate_contexts"] > 0
    assert all(row["style_group"] == "" and row["facts"] == "" for row in splits["test"])
    assert "LEAK" not in json.dumps(splits)


def test_a_source_without_a_path_is_refused(tmp_path, tokenizer_dir):
    recipe, run = open_run(tmp_path, tokenizer_dir, source="file")
    with pytest.raises(DataError, match="data.path is empty"):
        prepare_data(recipe, run)
    assert "data" not in run.manifest["stages"]


# --- splits ---------------------------------------------------------------------------------


def make_rows(groups: int, rows_per_group: int = 3) -> list[dict[str, str]]:
    return [
        make_row(f"{g}-{i}", f"group-{g}", "file", f"p{g}", "r", f"note {g}")
        for g in range(groups)
        for i in range(rows_per_group)
    ]


def test_splits_never_cut_through_a_group_and_keep_their_shares():
    sizes = {"train": 700, "validation": 100, "test": 200}
    splits = split_rows(make_rows(400), sizes, seed=7)
    assert find_leaks(splits, "group_id") == []
    assert len(splits["train"]) == 700 and 60 <= len(splits["validation"]) <= 100
    small = split_rows(make_rows(100), sizes, seed=7)
    assert 0.6 < len(small["train"]) / 300 < 0.8


def test_adding_rows_moves_no_group_to_another_split():
    sizes = {"train": 70, "validation": 10, "test": 20}
    before = {f"group-{g}": choose_split(f"group-{g}", sizes, 3) for g in range(50)}
    bigger = {name: 10 * size for name, size in sizes.items()}
    assert all(choose_split(group, bigger, 3) == name for group, name in before.items())
    assert any(choose_split(group, sizes, 4) != name for group, name in before.items())


def test_too_few_groups_for_three_splits_are_refused():
    with pytest.raises(DataError, match="too few groups"):
        split_rows(make_rows(1), {"train": 5, "validation": 1, "test": 1}, seed=0)


# --- the audit ------------------------------------------------------------------------------


def test_the_audit_counts_tokens_cuts_duplicates_and_leaks():
    class WordTokenizer:
        chat_template = "yes"

        def __call__(self, texts, add_special_tokens=True):
            return {"input_ids": [text.split() for text in texts]}

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

    lengths = [3, 3, 20, 40]
    rows = [make_row(str(i), str(i), "f", "w " * n, "a b", f"c{n}") for i, n in enumerate(lengths)]
    audit = audit_splits({"train": rows, "test": rows[:1]}, WordTokenizer(), max_length=22)
    train = audit["splits"]["train"]
    assert train["reference_tokens"] == train["reference_tokens"] | {"min": 3, "max": 3}
    assert train["prompt_tokens"]["max"] == 40
    assert (train["cut"], train["cut_share"], train["reference_all_cut"]) == (2, 0.5, 1)
    assert (train["duplicate_contexts"], train["duplicate_references"]) == (1, 3)
    assert audit["prompt_tokens"]["max"] == 40
    assert (audit["group_leaks"], audit["context_leaks"]) == (1, 1)
    assert sum(train["histogram"]["prompt"]) == 4
    assert np.diff(train["histogram"]["edges"]).min() >= 0


@pytest.mark.skipif(not REAL.exists(), reason="the real data are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "count"),
    [("mts-dialog/training.csv", 1201), ("mts-dialog/validation.csv", 100),
     ("mts-dialog/automatic_summaries.csv", 400), ("medec/validation.csv", 574)],
)  # fmt: skip
def test_real_files_are_read_whole(name, count):
    records = [record for _, record in read_records(REAL / name)]
    assert len(records) == count
    assert all(not key.startswith("\ufeff") for key in records[0])


@pytest.mark.skipif(not REAL.exists(), reason="the real data are not beside the checkout")
def test_mts_dialog_becomes_rows_once_its_columns_are_named(tmp_path):
    with (REAL / "mts-dialog" / "training.csv").open(encoding="utf-8-sig") as file:
        records = list(csv.DictReader(file))
    named = [{"context": r["dialogue"], "reference": r["section_text"]} for r in records]
    rows, dropped = load_own_rows(write_jsonl(tmp_path / "mts.jsonl", named), TEMPLATE)
    assert len(rows) + sum(dropped.values()) == 1201
    splits = split_rows(rows, {"train": 800, "validation": 100, "test": 100}, seed=0)
    assert find_leaks(splits, "group_id") == []
