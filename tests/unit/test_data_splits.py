"""Splits by group, drawn from a stream; notes that are nearly alike stay together."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from data_factory import make_text, plain_row
from hypothesis import given, settings
from hypothesis import strategies as st

from hallulib.data.schema import hash_context
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

pytestmark = pytest.mark.unit
SIZES = {"train": 70, "validation": 10, "test": 20}


def make_rows(groups: int, rows_per_group: int = 3) -> list[dict[str, str]]:
    return [
        plain_row(f"{g}-{i}", f"group-{g}", f"p{g}", "r", f"note {g}")
        for g in range(groups)
        for i in range(rows_per_group)
    ]


def note_rows(texts: list[str]) -> list[dict[str, str]]:
    return [plain_row(str(i), hash_context(t), t, "r", t) for i, t in enumerate(texts)]


def test_splits_never_cut_through_a_group_and_keep_their_shares():
    sizes = {"train": 700, "validation": 100, "test": 200}
    splits = split_rows(make_rows(400), sizes, seed=7)
    assert find_leaks(splits, "group_id") == []
    assert len(splits["train"]) == 700 and 60 <= len(splits["validation"]) <= 100
    small = split_rows(make_rows(100), sizes, seed=7)
    assert 0.6 < len(small["train"]) / 300 < 0.8


def test_adding_rows_moves_no_group_to_another_split():
    before = {f"group-{g}": choose_split(f"group-{g}", SIZES, 3) for g in range(50)}
    bigger = {name: 10 * size for name, size in SIZES.items()}
    assert all(choose_split(group, bigger, 3) == name for group, name in before.items())
    assert any(choose_split(group, SIZES, 4) != name for group, name in before.items())


def test_too_few_groups_for_three_splits_are_refused():
    with pytest.raises(DataError, match="too few groups"):
        split_rows(make_rows(1), {"train": 5, "validation": 1, "test": 1}, seed=0)


# --- drawn from a stream ---------------------------------------------------------------------


def draw(rows, sizes=SIZES, seed=3) -> tuple[list[dict], Counter]:
    dropped = Counter()
    return draw_rows(rows, sizes, seed, dropped), dropped


def test_what_is_drawn_from_a_stream_is_what_splitting_all_rows_would_keep():
    rows = make_rows(300)
    drawn, dropped = draw(iter(rows))
    assert split_rows(drawn, SIZES, 3) == split_rows(rows, SIZES, 3)
    assert len(drawn) + dropped["beyond_the_sizes"] == 900 and len(drawn) < 150


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_the_rows_does_not_change_the_draw(seed):
    rows = make_rows(120, rows_per_group=2)
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert {row["id"] for row in draw(shuffled)[0]} == {row["id"] for row in draw(rows)[0]}


def test_the_draw_holds_whole_groups_in_the_order_of_the_stream():
    rows = make_rows(300)
    drawn, _ = draw(rows)
    assert set(Counter(row["group_id"] for row in drawn).values()) == {3}
    assert drawn == [row for row in rows if row in drawn]


def test_rows_without_a_reference_come_with_their_group_and_do_not_count():
    rows = [row | {"reference": "" if row["id"].endswith("-1") else "r"} for row in make_rows(300)]
    drawn, dropped = draw(rows)
    counts = Counter(bool(row["reference"]) for row in drawn)
    assert counts[True] == 2 * counts[False]
    assert dropped["not_factual_beyond_the_sizes"] == 300 - counts[False]


# --- near-duplicates -------------------------------------------------------------------------


def change_words(text: str, count: int) -> str:
    words = text.split()
    for i in range(count):
        words[i * 20 + 5] = f"changed{i}"
    return " ".join(words)


def test_similarity_ignores_case_signs_and_spacing_and_falls_with_each_change():
    text = make_text(1, 100)
    assert measure_similarity(text, "  " + text.upper().replace(" ", " ,\n")) == 1
    one, three = (measure_similarity(text, change_words(text, n)) for n in (1, 3))
    assert 1 > one > 0.9 > three > 0.8
    assert measure_similarity(text, make_text(2, 100)) == 0
    assert measure_similarity("one", "one") == 1 and measure_similarity("", "x") == 0


def test_all_near_duplicates_above_the_threshold_are_found_and_none_below():
    base = [make_text(i, 100) for i in range(60)]
    near = [change_words(text, 1 + i % 4) for i, text in enumerate(base)]
    found = {(j, i - 60) for i, j in find_near_duplicates(base + near, 0.8)}
    similar = {(i, i) for i in range(60) if measure_similarity(base[i], near[i]) >= 0.8}
    assert found == similar and 30 < len(similar) < 60


def test_near_duplicates_join_the_group_of_the_first_and_chains_are_one_group():
    text = make_text(1, 100)
    rows = note_rows([text, make_text(2), change_words(text, 2), change_words(text, 4), text])
    merged, counts = merge_near_duplicates(rows, 0.8)
    groups = [row["group_id"] for row in merged]
    assert measure_similarity(rows[0]["context"], rows[3]["context"]) < 0.8
    assert groups[0] == groups[2] == groups[3] == groups[4] == rows[0]["group_id"] != groups[1]
    assert counts == {"merged_groups": 2, "largest_group": 4}


def test_rows_added_at_the_end_leave_the_groups_of_the_others_as_they_were():
    texts = [make_text(i, 100) for i in range(20)]
    before, _ = merge_near_duplicates(note_rows(texts), 0.8)
    more = texts + [change_words(text, 2) for text in texts]
    after, counts = merge_near_duplicates(note_rows(more), 0.8)
    assert after[:20] == before
    assert [row["group_id"] for row in after[20:]] == [row["group_id"] for row in before]
    assert counts["merged_groups"] == 20


def test_patients_of_two_notes_that_are_nearly_alike_become_one_group():
    text = make_text(1, 100)
    rows = note_rows([text, make_text(2), change_words(text, 1)])
    rows = [row | {"group_id": f"patient-{i}"} for i, row in enumerate(rows)]
    rows.append(rows[1] | {"id": "3", "group_id": "patient-2", "context": make_text(3)})
    groups = [row["group_id"] for row in merge_near_duplicates(rows, 0.8)[0]]
    assert groups == ["patient-0", "patient-1", "patient-0", "patient-0"]


def test_the_very_same_note_under_two_group_ids_is_one_group():
    rows = [row | {"group_id": row["id"]} for row in note_rows([make_text(1)] * 2 + [make_text(2)])]
    merged, counts = merge_near_duplicates(rows, 0.8)
    assert [row["group_id"] for row in merged] == ["0", "0", "2"]
    assert counts["merged_groups"] == 1


def test_a_near_duplicate_across_splits_is_a_leak_and_one_within_a_split_is_not():
    text = make_text(1, 100)
    rows = note_rows([text, change_words(text, 1), make_text(2)])
    apart = {"train": [rows[0] | {"split": "train"}], "test": [rows[1] | {"split": "test"}]}
    assert find_near_leaks(apart, 0.8) == [rows[0]["group_id"]]
    together = {"train": [row | {"split": "train"} for row in rows]}
    assert find_near_leaks(together, 0.8) == []
    same = {"train": [rows[0] | {"split": "train"}], "test": [rows[0] | {"split": "test"}]}
    assert len(find_near_leaks(same, 0.8)) == 1
