"""Pairs of every origin: sampled and judged, perturbed, twins, and the user's own."""

import json

import pandas as pd
import pytest
from tiny_model import copy_sft_run, finish, make_frame, make_recipe

from hallulib.detectors import Judgement, StatementVerdict
from hallulib.dpo import pairs as pairs_module
from hallulib.dpo.pairs import build_judge, build_pairs, choose_pair, judge_text, split_rows
from hallulib.errors import DataError
from hallulib.files import read_jsonl, sha256_text, sha256_tree
from hallulib.run import load_result

pytestmark = pytest.mark.unit


def sample(text: str, errors: int, statements: int = 3, finish_reason: str = "stop") -> dict:
    return {
        "text": text, "errors": errors, "statements": statements, "finish_reason": finish_reason,
        "error_types": ["detail"] * errors,
    }  # fmt: skip


A, B, C, D = sample("a", 0, 3), sample("b", 0, 5), sample("c", 2, 4), sample("d", 2, 6)
FEW = "fewer than two different, complete samples"


@pytest.mark.parametrize(
    ("samples", "chosen", "rejected"),
    [
        # fewest errors against most
        ([sample("a", 1), sample("b", 0), sample("c", 3)], "b", "c"),
        # among equals the one that states more is taken on both sides, whatever the order
        ([A, B, C, D], "b", "d"),
        ([D, C, B, A], "b", "d"),
    ],
)
def test_fewest_errors_are_chosen_against_most(samples, chosen, rejected):
    pair = choose_pair(samples)
    assert (pair["chosen"]["text"], pair["rejected"]["text"]) == (chosen, rejected)
    assert pair["error_types"] == ["detail"] * pair["rejected"]["errors"]


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        ([sample("a", 1), sample("b", 1)], "tie: the judge sees as many errors in every sample"),
        ([sample("a", 0), sample("a", 0)], FEW),
        ([sample("a", 0), sample("b", 2, finish_reason="length")], FEW),
        ([sample("", 0, statements=0), sample("b", 2)], FEW),
    ],
)
def test_ties_and_identical_cut_off_and_empty_samples_make_no_pair(samples, why):
    assert choose_pair(samples) == why


def test_the_judge_sees_the_text_of_the_note_only_and_names_the_errors():
    class Judge:
        name = "test"

        def judge(self, source, summary):
            assert source.text == "He takes aspirin." and source.facts is None
            wrong = StatementVerdict(summary, 0, len(summary), "drug", "not_in_note", "fabrication")
            return Judgement([wrong], [], self.name)

    judged = judge_text(Judge(), "He takes aspirin.", "He takes opium.")
    assert judged["errors"] == 1 and judged["error_types"] == ["fabrication"]
    assert judged["verdicts"] == [{"text": "He takes opium.", "verdict": "not_in_note"}]

    judge = build_judge(make_recipe({"pairs.judge_false_positive_rate": 0.2}).pairs, seed=0)
    assert (judge.false_positive_rate, judge.false_negative_rate) == (0.2, 0.10)


def test_more_notes_keep_the_notes_already_drawn():
    frame = make_frame(24, "train")
    few, more, other = (
        [note["id"] for note in pairs_module.draw_notes(frame, count, seed)]
        for count, seed in ((5, 0), (9, 0), (5, 1))
    )
    assert more[:5] == few and len(set(more)) == 9
    assert other != few


def test_validation_takes_whole_groups_and_at_least_one():
    rows = [{"group_id": f"g{number // 3}", "id": number} for number in range(30)]
    parts = split_rows(rows, 0.2, seed=0)
    groups = {split: {row["group_id"] for row in part} for split, part in parts.items()}
    assert len(groups["validation"]) == 2 and not groups["train"] & groups["validation"]
    assert sorted(row["id"] for part in parts.values() for row in part) == list(range(30))
    assert len(split_rows(rows[::15], 0.01, seed=0)["validation"]) == 1


def read_candidates(run) -> dict[str, list[dict]]:
    return {row["id"]: row["samples"] for row in read_jsonl(run.require("pairs/candidates.jsonl"))}


def read_parts(run) -> list[pd.DataFrame]:
    return [pd.read_parquet(run.require(f"pairs/{s}.parquet")) for s in ("train", "validation")]


@pytest.mark.parametrize("torn", ["", '{"id": "n2", "sam', '{"id": "n2", "samples": []}'])
def test_every_batch_is_on_the_disk_and_an_interrupted_pass_samples_only_the_rest(
    tmp_path, monkeypatch, torn
):
    recipe = make_recipe({"pairs.batch_size": 9})  # three notes with three samples each
    straight = copy_sft_run(tmp_path / "straight", recipe)
    broken = copy_sft_run(tmp_path / "broken", recipe)
    result = build_pairs(recipe, straight)
    work = broken.checkpoint_dir("pairs", recipe) / "candidates.jsonl"
    original, on_disk = pairs_module.generate_summaries, []

    def generate(policy, tokenizer, prompts, **options):
        assert len(prompts) == 3
        on_disk.append(len(work.read_text().splitlines()))
        if len(on_disk) == 3:
            raise KeyboardInterrupt
        return original(policy, tokenizer, prompts, **options)

    monkeypatch.setattr(pairs_module, "generate_summaries", generate)
    with pytest.raises(KeyboardInterrupt):
        build_pairs(recipe, broken)
    assert not broken.path("pairs/train.parquet").exists()
    work.write_text(work.read_text() + torn)
    assert build_pairs(recipe, broken).notes == result.notes
    assert on_disk == [0, 3, 6, 6, 9]
    assert sha256_tree(broken.path("pairs")) == sha256_tree(straight.path("pairs"))


def test_every_pair_is_made_of_two_samples_of_the_policy_and_the_notes_say_how(tmp_path):
    recipe = make_recipe()
    run = copy_sft_run(tmp_path / "run", recipe)
    notes = build_pairs(recipe, run).notes
    candidates = read_candidates(run)
    assert len(candidates) == 12 and sum(notes["counts"].values()) == 12
    assert all(len(samples) == 3 for samples in candidates.values())
    parts = read_parts(run)
    assert [len(part) for part in parts] == [notes["train"], notes["validation"]]
    assert notes["counts"]["pair"] == len(parts[0]) + len(parts[1]) == notes["yield"] * 12
    assert notes["judge"] == "entities+noise" and notes["edits"] == {} and notes["error_types"]
    assert notes["length_bias"]["pairs"] == notes["counts"]["pair"] and notes["cuts"]["cut"] == 0
    assert not set(parts[0]["group_id"]) & set(parts[1]["group_id"])
    rows = pd.concat(parts)
    assert set(rows["origin"]) == {"sampled"}
    seen = []
    for row in rows.to_dict("records"):
        by_text = {s["text"]: s for s in candidates[row["id"]]}
        chosen, rejected = by_text[row["chosen"]], by_text[row["rejected"]]
        assert chosen["errors"] < rejected["errors"]
        assert list(row["error_types"]) == sorted(rejected["error_types"])
        seen.append((chosen["errors"], rejected["errors"]))
    means = [sum(side) / len(seen) for side in zip(*seen, strict=True)]
    assert [notes[f"{side}_errors"] for side in ("chosen", "rejected")] == means


def test_the_same_candidates_make_the_same_pairs_as_ever(tmp_path):
    recipe = make_recipe({"pairs.notes": 24})
    run = copy_sft_run(tmp_path / "run", recipe)
    folder = run.checkpoint_dir("pairs", recipe)
    folder.mkdir(parents=True)
    lines = []
    for number in range(24):
        draws = [(number * 7 + k * 5) % 11 for k in range(3)]
        samples = [
            sample(f"{d % 5} of {number}", d % 3, 1 + d % 2, "length" if d == 9 else "stop")
            for d in draws
        ]
        lines.append(json.dumps({"id": f"train-{number}", "samples": samples}) + "\n")
    (folder / "candidates.jsonl").write_text("".join(lines))
    build_pairs(recipe, run)
    parts = read_parts(run)
    text = "".join(part.to_json(orient="records") for part in parts)
    assert [len(part) for part in parts] == [7, 2]
    assert sha256_text(text).startswith("2de3afa508c91495")


def test_too_few_pairs_is_an_error_that_counts_what_became_of_the_notes(tmp_path, monkeypatch):
    recipe = make_recipe()
    run = copy_sft_run(tmp_path / "run", recipe)
    monkeypatch.setattr(pairs_module, "choose_pair", lambda samples: "tie: as a test")
    with pytest.raises(DataError, match=r"0 pairs from 12 notes[\s\S]*'tie: as a test': 12"):
        build_pairs(recipe, run)


def build(tmp_path, overrides, change=None):
    """Pairs of a run whose training rows `change` has altered; returns (result, rows, run)."""
    recipe = make_recipe({"pairs.check_references": False} | overrides)
    run = copy_sft_run(tmp_path / "run", recipe)
    if change:
        frame = change(pd.read_parquet(run.path("data/train.parquet")))
        frame.to_parquet(run.path("data/train.parquet"), index=False)
        finish(run, recipe, "data", "sft")
    result = build_pairs(recipe, run)
    return result, pd.concat(read_parts(run)), run


def with_rejected(frame):
    return frame.assign(rejected=frame["reference"].str.replace("man", "woman"))


def test_a_perturbed_pair_is_a_reference_against_itself_with_one_typed_error(tmp_path):
    result, rows, run = build(tmp_path, {"pairs.origin": "perturbed"})
    references = pd.read_parquet(run.path("data/train.parquet")).set_index("id")["reference"]
    assert len(rows) == result.notes["counts"]["pair"] >= 10
    for row in rows.to_dict("records"):
        assert row["chosen"] == references[row["id"]] != row["rejected"]
        assert row["origin"] == "perturbed" and len(row["error_types"]) == 1 and row["edit"]
    assert sum(result.notes["edits"].values()) == len(rows)
    assert abs(result.notes["length_bias"]["mean_gap"]) < 3
    assert result.notes["yield"] == len(rows) / 12
    again, other = (
        build(tmp_path / name, {"pairs.origin": "perturbed", "seed": seed})[1]
        for name, seed in (("again", 0), ("other", 1))
    )
    assert again["rejected"].tolist() == rows["rejected"].tolist() != other["rejected"].tolist()


def test_references_in_which_the_judge_finds_an_error_are_left_out_where_asked(tmp_path):
    noise = {"pairs.judge_false_positive_rate": 0, "pairs.judge_false_negative_rate": 0}
    settings = noise | {"pairs.origin": "perturbed", "pairs.check_references": True}
    result, rows, run = build(tmp_path, settings)
    notes = pd.read_parquet(run.path("data/train.parquet")).set_index("id")["context"]
    assert result.notes["counts"]["the judge finds an error in the reference"] > 0
    # a reference states an allergy whether or not the note does (see tiny_model)
    assert all("Allergies" in notes[name] for name in rows["id"])
    assert result.notes["chosen_errors"] == 0 < result.notes["rejected_errors"]


@pytest.mark.parametrize("origin", ["twin", "given"])
def test_twins_and_given_pairs_are_the_sides_that_came_with_the_rows(tmp_path, origin):
    _, rows, run = build(tmp_path, {"pairs.origin": origin}, with_rejected)
    assert set(rows["origin"]) == {origin} and len(rows) == 12
    assert all(row.rejected == row.chosen.replace("man", "woman") for row in rows.itertuples())
    candidates = read_candidates(run)
    for row in rows.itertuples():
        assert [s["text"] for s in candidates[row.id]] == [row.chosen, row.rejected]
    # The judge checks what is asked, but never the user's own pairs.
    settings = {"pairs.origin": origin, "pairs.check_references": True}
    checked = build(tmp_path / "checked", settings, with_rejected)[1]
    assert len(checked) == 12 if origin == "given" else len(checked) < 12


def test_notes_without_a_rejected_side_are_counted_and_none_at_all_is_an_error(tmp_path):
    def half(frame):
        return with_rejected(frame).assign(
            rejected=lambda f: f["rejected"].where(f["id"].str[-1].isin(list("01234")), "")
        )

    result, rows, run = build(tmp_path / "half", {"pairs.origin": "given"}, half)
    assert set(read_candidates(run)) == set(rows["id"])
    assert result.notes["counts"]["no rejected side came with the note"] == 12 - len(rows) > 0
    with pytest.raises(DataError, match="'twin', and none of 12 notes came with a rejected side"):
        build(tmp_path / "none", {"pairs.origin": "twin"})


def test_pairs_that_would_be_cut_are_refused_before_anything_is_written(tmp_path):
    def lengthen(frame):
        return frame.assign(rejected=frame["reference"] * 9)

    settings = {"pairs.origin": "given"}
    with pytest.raises(DataError, match=r"12 pairs \(100.0%\) exceed model.max_length of 160"):
        build(tmp_path / "a", settings, lengthen)
    assert not (tmp_path / "a" / "run" / "pairs").exists()
    result, _, _ = build(tmp_path / "b", settings | {"data.max_cut_share": 1}, lengthen)
    assert result.notes["cuts"]["cut"] == 12


def test_a_result_is_read_back_and_max_pairs_keeps_the_first(tmp_path):
    all_rows = build(tmp_path / "all", {"pairs.origin": "perturbed"})[1]
    settings = {"pairs.origin": "perturbed", "pairs.max_pairs": 5}
    result, rows, run = build(tmp_path / "few", settings)
    assert len(rows) == 5 and set(rows["id"]) < set(all_rows["id"])
    assert result.notes["counts"]["beyond pairs.max_pairs"] == len(all_rows) - 5
    assert result.notes["yield"] == len(all_rows) / 12
    assert load_result(run, "pairs") == result
