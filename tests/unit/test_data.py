"""Data: into one schema, split by group, near-duplicates kept together, audited."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from data_factory import make_text, open_run, plain_row, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from hallulib.clinic import HELD_OUT_STYLE, check
from hallulib.data import audit_splits, describe_cuts, prepare_data, refuse_cut_rows
from hallulib.data.audit import find_damage
from hallulib.data.lengths import describe_length_bias
from hallulib.data.schema import COLUMNS, SPLITS, hash_context, read_facts
from hallulib.data.splits import (
    choose_split,
    draw_rows,
    find_leaks,
    find_near_duplicates,
    find_near_leaks,
    measure_similarity,
    merge_near_duplicates,
    split_rows,
)
from hallulib.errors import DataError
from hallulib.run import Run

pytestmark = pytest.mark.unit
SIZES = {"train": 70, "validation": 10, "test": 20}


# --- the clinic -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clinic(tmp_path_factory):
    """(recipe, run, result, split -> rows) of a small run."""
    recipe, run = open_run(tmp_path_factory.mktemp("clinic"))
    result = prepare_data(recipe, run)
    return recipe, run, result, {name: result.read(name) for name in SPLITS}


def test_the_clinic_fills_every_split_with_whole_rows_and_no_group_crosses_them(clinic):
    *_, result, splits = clinic
    assert [len(splits[name]) for name in SPLITS] == [60, 12, 21]
    assert find_leaks(splits, "group_id") == [] == find_leaks(splits, "context")
    for row in (row for rows in splits.values() for row in rows):
        assert tuple(row) == COLUMNS and row in splits[row["split"]]
        assert row["prompt"] == f"Summarise the note.\n\n{row['context']}"
        assert row["reference"] not in row["prompt"] and row["rejected"] not in row["prompt"]
        verdicts = check(read_facts(row), row["rejected"])  # one fact is exchanged
        assert len({v["kind"] for v in verdicts if v["verdict"] != "supported"}) == 1
        assert row["rejected"] != row["reference"] and "distractors" in read_facts(row)
    assert result.audit["splits"]["train"]["length_bias"]["pairs"] == 60
    assert result.audit["splits"]["train"]["sources"] == {"clinic": 60}
    assert result.audit["dropped"] == {}


def test_the_held_out_style_is_in_half_of_the_test_notes_and_nowhere_else(clinic):
    styles = {name: [row["style"] for row in rows] for name, rows in clinic[3].items()}
    assert HELD_OUT_STYLE not in styles["train"] + styles["validation"]
    assert styles["test"].count(HELD_OUT_STYLE) == 10
    assert Counter(r["style_group"] for r in clinic[3]["test"]) == {"held_out": 10, "seen": 11}


def test_references_state_what_the_note_does_not_and_the_audit_says_how_often(clinic):
    found = clinic[2].audit["references"]
    assert found["summary"]["n"] == 60 and 0.4 < found["summary"]["value"] < 0.95
    kinds = set(found["by_kind"])
    assert kinds and kinds <= {"allergies", "family_history", "smoking", "follow_up"}
    assert found["in_reference"]["allergies"] > found["in_note"]["allergies"] > 0.5
    assert found["in_reference"]["age"] == found["in_note"]["age"] == 1


def test_the_result_of_a_finished_stage_is_read_back_and_not_made_again(clinic, capsys):
    recipe, run, first, _ = clinic
    again = prepare_data(recipe, run)
    assert "data: unchanged" in capsys.readouterr().out
    assert again.audit == json.loads(json.dumps(first.audit)) and again.counts == first.counts


def test_the_same_recipe_gives_the_same_rows_and_another_seed_gives_others(clinic, tmp_path):
    recipe, run = open_run(tmp_path / "a")
    assert prepare_data(recipe, run).read("test") == clinic[3]["test"]
    other = recipe.model_copy(update={"seed": 1})
    changed = prepare_data(other, Run.open(tmp_path / "b", other)).read("test")
    assert not {row["context"] for row in changed} & {row["context"] for row in clinic[3]["test"]}


# --- splits, drawn from a stream -------------------------------------------------------------


def make_rows(groups: int, rows_per_group: int = 3) -> list[dict[str, str]]:
    return [
        plain_row(f"{g}-{i}", f"group-{g}", f"p{g}", "r", f"note {g}")
        for g in range(groups)
        for i in range(rows_per_group)
    ]


def draw(rows) -> tuple[list[dict], Counter]:
    dropped = Counter()
    return draw_rows(rows, SIZES, 3, dropped), dropped


def test_splits_never_cut_through_a_group_and_keep_their_shares():
    sizes = {name: 10 * size for name, size in SIZES.items()}
    splits = split_rows(make_rows(400), sizes, seed=7)
    assert find_leaks(splits, "group_id") == []
    assert len(splits["train"]) == 700 and 60 <= len(splits["validation"]) <= 100
    assert 0.6 < len(split_rows(make_rows(100), sizes, seed=7)["train"]) / 300 < 0.8
    with pytest.raises(DataError, match="too few groups"):
        split_rows(make_rows(1), {"train": 5, "validation": 1, "test": 1}, seed=0)


def test_more_rows_move_no_group_to_another_split_and_another_seed_does():
    before = {f"group-{g}": choose_split(f"group-{g}", SIZES, 3) for g in range(50)}
    bigger = {name: 10 * size for name, size in SIZES.items()}
    assert all(choose_split(group, bigger, 3) == name for group, name in before.items())
    assert any(choose_split(group, SIZES, 4) != name for group, name in before.items())


def test_what_is_drawn_are_whole_groups_and_what_splitting_all_rows_would_keep():
    rows = make_rows(300)
    drawn, dropped = draw(iter(rows))
    assert split_rows(drawn, SIZES, 3) == split_rows(rows, SIZES, 3)
    assert len(drawn) + dropped["beyond_the_sizes"] == 900 and len(drawn) < 150
    assert set(Counter(row["group_id"] for row in drawn).values()) == {3}
    assert drawn == [row for row in rows if row in drawn]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_the_rows_does_not_change_the_draw(seed):
    rows = make_rows(120, rows_per_group=2)
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert {row["id"] for row in draw(shuffled)[0]} == {row["id"] for row in draw(rows)[0]}


def test_rows_without_a_reference_come_with_their_group_and_do_not_count():
    rows = [row | {"reference": "" if row["id"].endswith("-1") else "r"} for row in make_rows(300)]
    drawn, dropped = draw(rows)
    counts = Counter(bool(row["reference"]) for row in drawn)
    assert counts[True] == 2 * counts[False]
    assert dropped["not_factual_beyond_the_sizes"] == 300 - counts[False]


# --- near-duplicates -------------------------------------------------------------------------

TEXT = make_text(1, 100)


def change_words(text: str, count: int) -> str:
    words = text.split()
    for i in range(count):
        words[i * 20 + 5] = f"changed{i}"
    return " ".join(words)


def merge(texts, groups=None) -> tuple[list[str], dict]:
    """The group ids of notes after the merge, and its counts."""
    groups = groups or map(hash_context, texts)
    rows = [plain_row("1", group, t, "r", t) for t, group in zip(texts, groups, strict=True)]
    merged, counts = merge_near_duplicates(rows, 0.8)
    return [row["group_id"] for row in merged], counts


def test_similarity_ignores_case_signs_and_spacing_and_falls_with_each_change():
    assert measure_similarity(TEXT, "  " + TEXT.upper().replace(" ", " ,\n")) == 1
    one, three = (measure_similarity(TEXT, change_words(TEXT, n)) for n in (1, 3))
    assert 1 > one > 0.9 > three > 0.8
    assert measure_similarity(TEXT, make_text(2, 100)) == 0
    assert measure_similarity("one", "one") == 1 and measure_similarity("", "x") == 0


def test_all_near_duplicates_above_the_threshold_are_found_and_none_below():
    base = [make_text(i, 100) for i in range(60)]
    near = [change_words(text, 1 + i % 4) for i, text in enumerate(base)]
    found = {(j, i - 60) for i, j in find_near_duplicates(base + near, 0.8)}
    similar = {(i, i) for i in range(60) if measure_similarity(base[i], near[i]) >= 0.8}
    assert found == similar and 30 < len(similar) < 60


def test_near_duplicates_join_the_group_of_the_first_and_chains_are_one_group():
    texts = [TEXT, make_text(2), change_words(TEXT, 2), change_words(TEXT, 4), TEXT]
    assert measure_similarity(texts[0], texts[3]) < 0.8
    first, other = hash_context(TEXT), hash_context(texts[1])
    expected = {"merged_groups": 2, "largest_group": 4}
    assert merge(texts) == ([first, other, first, first, first], expected)
    tied = [TEXT, make_text(2), change_words(TEXT, 1), make_text(3)]  # "c" wrote the last two
    assert merge(tied, "abcc")[0] == list("abaa")
    assert merge([TEXT, TEXT, make_text(2)], "abc")[0] == list("aac")


def test_a_near_duplicate_across_splits_is_a_leak_and_one_within_a_split_is_not():
    texts = TEXT, change_words(TEXT, 1), make_text(2)
    first, near, _ = rows = [plain_row("1", hash_context(t), t, "r", t) for t in texts]
    assert find_near_leaks({"train": [first], "test": [near]}, 0.8) == [first["group_id"]]
    assert find_near_leaks({"train": [first], "test": [first]}, 0.8) == [first["group_id"]]
    assert find_near_leaks({"train": rows}, 0.8) == []


@pytest.mark.parametrize("near", [0.8, 0])
def test_near_duplicates_of_the_users_file_stay_in_one_split(tmp_path, near):
    texts = [make_text(i // 3, 90) + f" visit {i}" for i in range(240)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"context": t, "reference": "Well."} for t in texts])
    more = {"source": "file", "path": str(path), "near_duplicates": near, "max_cut_share": 1}
    result = prepare_data(*open_run(tmp_path, **more))
    train, test = ({r["context"].split()[0] for r in result.read(s)} for s in ("train", "test"))
    assert bool(train & test) != bool(near)
    assert (result.audit.get("merged_groups", 0) > 30) == bool(near)
    assert result.audit["leaks"]["near_duplicates"] == ([] if near else None)


def test_rows_added_to_a_file_move_no_row_to_another_split(tmp_path):
    texts = [make_text(i, 60) for i in range(90)]
    where = []
    for part in (texts, texts + [text + " again" for text in texts[::3]] + [make_text(99, 60)]):
        records = [{"id": str(i), "context": t, "reference": "Well."} for i, t in enumerate(part)]
        path = write_jsonl(tmp_path / f"{len(part)}.jsonl", records)
        more = {"source": "file", "path": str(path), "max_cut_share": 1}
        result = prepare_data(*open_run(tmp_path / path.stem, **more))
        where.append({row["id"]: split for split in SPLITS for row in result.read(split)})
    both = where[0].keys() & where[1].keys()
    assert len(both) > 40 and all(where[0][i] == where[1][i] for i in both)


# --- the audit ------------------------------------------------------------------------------


class WordTokenizer:
    """One token per word, so that lengths can be counted by eye."""

    chat_template = "yes"

    def __call__(self, texts, **_):
        return {"input_ids": [text.split() for text in texts]}

    def apply_chat_template(self, messages, **_):
        return messages[0]["content"]


def test_the_audit_counts_tokens_cuts_duplicates_and_leaks_and_refuses_too_many_cuts():
    lengths = [3, 3, 20, 40]
    rows = [plain_row(str(i), str(i), "w " * n, "a b", f"c{n}") for i, n in enumerate(lengths)]
    found = audit_splits({"train": rows, "test": rows[:1]}, WordTokenizer(), 22, near=0.8)
    train = found["splits"]["train"]
    assert train["reference_tokens"] == train["reference_tokens"] | {"min": 3, "max": 3}
    assert train["prompt_tokens"]["max"] == 40
    assert (train["cut"], train["cut_share"], train["labels_all_lost"]) == (2, 0.5, 1)
    assert (train["duplicate_contexts"], train["duplicate_references"]) == (1, 3)
    assert (found["leaks"]["groups"], found["leaks"]["contexts"]) == (["0"], 1)
    assert sum(train["histogram"]["prompt"]) == 4
    assert np.diff(train["histogram"]["edges"]).min() >= 0
    assert train["rejected_tokens"] is None and train["length_bias"] is None
    with pytest.raises(DataError, match="2 of 4 training rows .50.0%. exceed model"):
        refuse_cut_rows(found, 0.49)
    refuse_cut_rows(found, 0.5)


def test_cuts_and_length_bias_are_those_counted_by_hand():
    prompts, completions = np.array([4, 8, 12, 2]), np.array([4, 4, 4, 12])
    lost = {"label_tokens_lost": (2 + 4 + 4) / 24, "labels_all_lost": 1}  # of 24 completion tokens
    assert describe_cuts(prompts, completions, 10) == {"cut": 3, "cut_share": 0.75} | lost
    bias = describe_length_bias(np.array([5, 5, 5, 5]), np.array([7, 6, 5, 4]))
    assert bias == {"pairs": 4, "mean_gap": 0.5, "preferred_shorter": 0.625}


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
    rows = [plain_row("1", "g", "p", "Same.", "c", "Same."), plain_row("2", "g", "p", "c", "c")]
    found = {"reference and rejected: identical", "reference: copies the whole note"}
    assert set(find_damage(rows)) == found


def test_a_refused_stage_leaves_its_audit_behind_and_no_rows(tmp_path):
    records = [{"context": make_text(i, 300), "reference": "Well."} for i in range(120)]
    path = write_jsonl(tmp_path / "long.jsonl", records)
    recipe, run = open_run(tmp_path, source="file", path=str(path))
    with pytest.raises(DataError, match="data.max_cut_share"):
        prepare_data(recipe, run)
    assert json.loads(run.path("data/audit.json").read_text("utf-8"))["max_length"] == 640
    assert not run.path("data/train.parquet").exists()
    assert "data" not in run.manifest["stages"]
