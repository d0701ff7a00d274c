"""Data: MedHal, the user's files and the clinic, into one schema, split by group, audited."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_factory import TEMPLATE, make_text, open_run, plain_row, write_jsonl

from hallulib.clinic import HELD_OUT_STYLE, check
from hallulib.data import COLUMNS, SPLITS, load_data_result, prepare_data, read_facts
from hallulib.data.audit import audit_splits, find_damage, refuse_cut_rows
from hallulib.data.lengths import describe_cuts, describe_length_bias
from hallulib.data.schema import build_prompt
from hallulib.data.splits import find_leaks
from hallulib.errors import DataError
from hallulib.run import Run

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    recipe, run = open_run(tmp_path_factory.mktemp("clinic"))
    return recipe, run, prepare_data(recipe, run)


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


def test_no_prompt_holds_the_reference_or_the_rejected_side(clinic):
    _, _, result = clinic
    for row in (row for name in SPLITS for row in result.read(name)):
        assert row["prompt"] == build_prompt(TEMPLATE, row["context"])
        assert row["reference"] not in row["prompt"] and row["rejected"] not in row["prompt"]


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


def test_the_same_recipe_gives_the_same_rows_and_another_seed_gives_others(clinic, tmp_path):
    _, _, first = clinic
    recipe, run = open_run(tmp_path / "a")
    assert prepare_data(recipe, run).read("test") == first.read("test")
    other = recipe.model_copy(update={"seed": 1})
    changed = prepare_data(other, Run.open(tmp_path / "b", other)).read("test")
    assert not {row["context"] for row in changed} & {row["context"] for row in first.read("test")}


def errors(row, side) -> set[str]:
    verdicts = check(read_facts(row), row[side])
    return {verdict["kind"] for verdict in verdicts if verdict["verdict"] != "supported"}


def test_every_clinic_row_has_its_twin_with_one_fact_exchanged(clinic):
    _, _, result = clinic
    rows = result.read("train")
    assert all(row["rejected"] and row["rejected"] != row["reference"] for row in rows)
    assert result.audit["splits"]["train"]["sources"] == {
        "clinic": {"rows": 60, "cut": 0, "with_rejected": 60}
    }
    assert result.audit["dropped"] == {}
    assert all(len(errors(row, "rejected")) == 1 for row in rows)


# --- the audit ------------------------------------------------------------------------------


class WordTokenizer:
    """One token per word, so that lengths can be counted by eye."""

    chat_template = "yes"

    def __call__(self, texts, **_):
        return {"input_ids": [text.split() for text in texts]}

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]


def audit(rows, max_length=22, test=()):
    rows = [row | {"split": "train"} for row in rows]
    test = [row | {"split": "test"} for row in test or rows[:1]]
    return audit_splits({"train": rows, "test": test}, WordTokenizer(), max_length, 0.8)


def test_the_audit_counts_tokens_cuts_duplicates_and_leaks():
    lengths = [3, 3, 20, 40]
    rows = [plain_row(str(i), str(i), "w " * n, "a b", f"c{n}") for i, n in enumerate(lengths)]
    found = audit(rows)
    train = found["splits"]["train"]
    assert train["reference_tokens"] == train["reference_tokens"] | {"min": 3, "max": 3}
    assert train["prompt_tokens"]["max"] == 40
    assert (train["cut"], train["cut_share"], train["labels_all_lost"]) == (2, 0.5, 1)
    assert (train["duplicate_contexts"], train["duplicate_references"]) == (1, 3)
    assert (found["leaks"]["groups"], found["leaks"]["contexts"]) == (["0"], 1)
    assert sum(train["histogram"]["prompt"]) == 4
    assert np.diff(train["histogram"]["edges"]).min() >= 0
    assert train["rejected_tokens"] is None and train["length_bias"] is None


def test_what_a_cut_does_to_labels_and_prompts_is_counted_by_hand():
    prompts, completions = np.array([4, 8, 12, 2]), np.array([4, 4, 4, 12])
    assert describe_cuts(prompts, completions, max_length=10) == {
        "cut": 3, "cut_share": 0.75,
        "label_tokens_lost": (2 + 4 + 4) / 24,  # of 24 completion tokens
        "labels_all_lost": 1,
        "prompt_tokens_lost": (2 + 6 + 2) / 26,
        "completion_too_long": 1,
    }  # fmt: skip


def test_length_bias_is_what_a_rule_by_length_alone_would_win():
    chosen, rejected = np.array([5, 5, 5, 5]), np.array([7, 6, 5, 4])
    assert describe_length_bias(chosen, rejected) == {
        "pairs": 4, "chosen_mean": 5.0, "rejected_mean": 5.5, "mean_gap": 0.5,
        "preferred_shorter": 0.625,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "finding"),
    [("  ", "empty"), ("7 | 8 | 9 | 12.5", "not_words"), ("A cafÃ© au lait", "encoding_damage"),
     ("It\ufffds sore", "encoding_damage"), ("pain\x00 and fever", "control_signs"),
     ("fever &amp; chills<br/>", "markup")],
)  # fmt: skip
def test_damaged_text_is_found_and_the_rows_are_named(text, finding):
    clean = plain_row("ok", "g", "A note, 5 mg; naïve.", "Sümmary – “fine”.\n\tYes.", "c")
    rows = [clean, plain_row("row-2", "g", "A note.", text, "c")]
    assert find_damage(rows) == {f"reference: {finding}": {"rows": 1, "examples": ["row-2"]}}


def test_identical_sides_and_references_that_copy_their_note_are_found():
    rows = [plain_row("1", "g", "p", "Same.", "c", "Same.")]
    rows += [plain_row("2", "g", "p", "c", "c")]
    assert set(find_damage(rows)) == {
        "reference and rejected: identical", "reference: copies the whole note",
    }  # fmt: skip


def test_more_cut_rows_than_the_recipe_allows_are_refused_and_fewer_are_not():
    rows = [plain_row(str(i), str(i), "w " * n, "a b", f"{n}") for i, n in enumerate([3, 40])]
    found = audit(rows)
    with pytest.raises(DataError, match="1 of 2 training rows .50.0%. exceed model"):
        refuse_cut_rows(found, 0.49)
    refuse_cut_rows(found, 0.5)


def test_a_refused_stage_leaves_its_audit_behind_and_no_rows(tmp_path):
    records = [{"context": make_text(i, 300), "reference": "Well."} for i in range(120)]
    path = write_jsonl(tmp_path / "long.jsonl", records)
    recipe, run = open_run(tmp_path, source="file", path=str(path))
    with pytest.raises(DataError, match="data.max_cut_share"):
        prepare_data(recipe, run)
    assert json.loads(run.path("data/audit.json").read_text("utf-8"))["max_length"] == 640
    assert not run.path("data/train.parquet").exists()
    assert "data" not in run.manifest["stages"]


def test_rows_added_to_a_file_move_no_row_to_another_split(tmp_path):
    texts = [make_text(i, 60) for i in range(90)]
    more = texts + [text + " again" for text in texts[::3]] + [make_text(99, 60)]
    where = []
    for name, part in (("before", texts), ("after", more)):
        records = [{"id": str(i), "context": t, "reference": "Well."} for i, t in enumerate(part)]
        path = write_jsonl(tmp_path / f"{name}.jsonl", records)
        recipe, run = open_run(tmp_path / name, source="file", path=str(path), max_cut_share=1)
        result = prepare_data(recipe, run)
        where.append({row["id"]: split for split in SPLITS for row in result.read(split)})
    both = where[0].keys() & where[1].keys()
    assert len(both) > 40 and all(where[0][i] == where[1][i] for i in both)


def test_near_duplicates_of_the_users_file_stay_in_one_split(tmp_path):
    texts = [make_text(i // 3, 90) + f" visit {i}" for i in range(240)]
    records = [{"context": text, "reference": "Well."} for text in texts]
    path = write_jsonl(tmp_path / "near.jsonl", records)
    splits = {}
    for near in (0.8, 0):
        settings = {"source": "file", "path": str(path), "near_duplicates": near}
        recipe, run = open_run(tmp_path / str(near), max_cut_share=1, **settings)
        result = prepare_data(recipe, run)
        splits[near] = {name: result.read(name) for name in SPLITS}
        assert (result.audit.get("merged_groups", 0) > 30) == bool(near)
        assert result.audit["leaks"]["near_duplicates"] == ([] if near else None)
    first_words = [
        {name: {row["context"].split()[0] for row in rows} for name, rows in part.items()}
        for part in splits.values()
    ]
    assert not first_words[0]["train"] & first_words[0]["test"]
    assert first_words[1]["train"] & first_words[1]["test"]
