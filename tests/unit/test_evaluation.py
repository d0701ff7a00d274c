"""Evaluation: what the numbers mean, what the report says, and a stage that resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import LlamaConfig, LlamaForCausalLM

from hallulib.adapters import attach_adapter, save_adapter
from hallulib.clinic.base_model import build_tokenizer
from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_summary
from hallulib.data import prepare_data
from hallulib.detectors import Source, get_detector
from hallulib.errors import DataError, MissingArtifact, RecipeError
from hallulib.evaluation import card as card_module
from hallulib.evaluation import (
    change_on_item,
    evaluate,
    evaluate_systems,
    find_changed_items,
    headline_rows,
    headline_table,
    highlight_facts,
    highlight_statements,
    load_evaluation_result,
    result_sentences,
)
from hallulib.evaluation.evaluate import check_independent_detector, choose_items
from hallulib.evaluation.metrics import (
    PRIMARY,
    build_summary,
    choose_comparisons,
    compare_systems,
    make_record,
    summarise_system,
)
from hallulib.evaluation.report import percent, say_small_n
from hallulib.models import load_base_model
from hallulib.recipe import load_recipe
from hallulib.run import STAGES, Run

pytestmark = pytest.mark.unit
NOTES = make_notes(60, seed=9, missing_rate=0.3)
INVENTED = " Smoking: 90 pack-years."


def write(note, how: str) -> str:
    """A summary of a note that is clean, invents, leaves out, or says nothing."""
    texts = {
        "clean": write_summary(note.facts),
        "invents": write_summary(note.facts) + INVENTED,
        "short": write_summary({k: v for k, v in note.facts.items() if k != "medications"}),
        "empty": "",
        "garbage": "ba ba ba.",
    }
    return texts[how]


def make_records(system: str, hows: list[str], style_groups: list[str] | None = None) -> list[dict]:
    records, exact = [], get_detector("facts")
    for place, (note, how) in enumerate(zip(NOTES, hows, strict=False)):
        text = write(note, how)
        generation = {
            "id": note.id, "group_id": note.id, "style": note.style, "system": system,
            "style_group": style_groups[place] if style_groups else "seen", "text": text,
            "n_tokens": len(text.split()), "finish_reason": "stop",
        }  # fmt: skip
        records.append(make_record(generation, exact.judge(Source(note.text, note.facts), text)))
    return records


# --- metrics --------------------------------------------------------------------------------


def test_the_primary_rate_counts_answered_summaries_and_null_is_never_false():
    records = make_records("sft", ["invents"] * 6 + ["clean"] * 4 + ["empty"] * 2 + ["garbage"])
    figures = summarise_system(records)
    rate = figures["rates"][PRIMARY]
    assert (rate["k"], rate["n"], rate["unit"]) == (6, 10, "answered summary")
    assert figures["interval"] == pytest.approx([0.3127, 0.8318], abs=1e-4)
    assert figures["rates"]["hallucination_rate@all"]["n"] == 13
    assert figures["answer_rate"] == pytest.approx(10 / 13)
    assert figures["unparsed_statements"] == 1
    assert figures["rates"]["suspect_rate@summary"]["k"] == 9
    assert [r["hallucinated"] for r in records[-3:]] == [None] * 3


def test_a_system_that_never_answers_has_no_rate_instead_of_a_good_one():
    figures = summarise_system(make_records("x", ["empty"] * 5))
    assert figures["hallucination_rate"] is None and figures["interval"] == [None, None]
    assert figures["omission_rate"] == 1.0


def test_omissions_are_the_share_of_stated_facts_that_the_summary_lacks():
    records = make_records("x", ["short"] * 10 + ["clean"] * 10)
    stated = sum(len(note.facts) for note in NOTES[:20])
    rate = summarise_system(records)["rates"]["omission_rate"]
    assert (rate["k"], rate["n"]) == (10, stated)
    assert rate["low"] < rate["value"] < rate["high"]
    assert summarise_system(records)["omissions_per_summary"] == 0.5
    assert summarise_system(records)["omitted_kinds"] == {"medications": 10}


def test_error_types_and_kinds_are_counted():
    figures = summarise_system(make_records("x", ["invents"] * 5))
    assert sum(figures["error_types"].values()) == 5
    assert figures["error_kinds"] == {"smoking": 5}
    assert figures["statement_rate"] == pytest.approx(
        5 / sum(len(r["statements"]) for r in make_records("x", ["invents"] * 5))
    )


def test_two_systems_are_joined_by_id_whatever_their_order():
    before = make_records("sft", ["invents"] * 8 + ["clean"] * 4)
    after = make_records("dpo", ["clean"] * 7 + ["invents"] * 2 + ["clean"] * 3)
    comparison = compare_systems(before, after[::-1])
    paired = comparison["paired"]
    assert (comparison["a"], comparison["b"]) == ("sft", "dpo")
    assert (paired["n"], paired["b"], paired["c"], paired["both_bad"]) == (12, 7, 1, 1)
    assert paired["difference"] == pytest.approx(0.5)


def test_items_that_one_system_did_not_answer_are_excluded_and_counted():
    before = make_records("sft", ["invents"] * 5)
    after = make_records("dpo", ["clean"] * 3 + ["empty"] * 2)
    comparison = compare_systems(before, after)
    assert (comparison["paired"]["n"], comparison["n_excluded"]) == (3, 2)
    assert compare_systems(before, make_records("dpo", ["empty"] * 5))["paired"] is None


def test_systems_on_different_items_are_not_compared():
    before = make_records("sft", ["clean"] * 5)
    with pytest.raises(ValueError, match="same items"):
        compare_systems(before, make_records("dpo", ["clean"] * 4))
    with pytest.raises(ValueError, match="same items"):
        compare_systems(before + before[:1], make_records("dpo", ["clean"] * 5))


def test_the_comparisons_are_declared_and_each_arm_meets_sft_and_dpo():
    assert choose_comparisons(["base", "sft", "dpo", "arm"]) == [
        ("base", "sft"), ("sft", "dpo"), ("sft", "arm"), ("arm", "dpo"),
    ]  # fmt: skip


def test_style_groups_are_reported_apart():
    groups = ["seen"] * 6 + ["held_out"] * 6
    records = make_records("sft", ["clean"] * 6 + ["invents"] * 6, groups)
    by_style = build_summary(records)["by_style"]
    assert list(by_style) == ["seen", "held_out"]
    assert by_style["seen"]["sft"]["hallucinated"] == 0
    assert by_style["held_out"]["sft"]["hallucinated"] == 6


# --- guardrails and sentences ---------------------------------------------------------------


def summary_of(before: list[str], after: list[str]) -> dict:
    return build_summary(make_records("sft", before) + make_records("dpo", after))


def test_guardrails_hold_when_nothing_was_paid():
    summary = summary_of(["invents"] * 40, ["clean"] * 40)
    assert all(entry["ok"] for entry in summary["guardrails"])
    assert any("Guardrails sft -> dpo: held" in s for s in result_sentences(summary))


@pytest.mark.parametrize(
    ("after", "name"),
    [(["short"] * 40, "omission_rate"), (["clean"] * 36 + ["empty"] * 4, "answer_rate"),
     (["clean"] * 20 + ["garbage"] * 20, "answer_rate"), (["empty"] * 40, "mean_words")],
)  # fmt: skip
def test_a_rate_bought_with_less_text_turns_a_guardrail_red(after, name):
    summary = summary_of(["invents"] * 40, after)
    red = {entry["name"] for entry in summary["guardrails"] if not entry["ok"]}
    assert name in red
    warnings = [s for s in result_sentences(summary) if s.startswith("GUARDRAIL")]
    assert len(warnings) == len(red)
    assert all("bought" in s for s in warnings)


def test_unreadable_statements_turn_a_guardrail_red():
    assert all(g["ok"] for g in summary_of(["clean"] * 40, ["clean"] * 40)["guardrails"])
    worse = make_records("dpo", ["clean"] * 40)
    for record in worse:
        record["n_unparsed"] += 1
        record["n_statements"] += 1
    summary = build_summary(make_records("sft", ["clean"] * 40) + worse)
    red = [g["name"] for g in summary["guardrails"] if not g["ok"]]
    assert red == ["unparsed_statement_rate"]


def test_sentences_carry_counts_intervals_b_and_c_and_p():
    summary = summary_of(["invents"] * 30 + ["clean"] * 20, ["invents"] * 5 + ["clean"] * 45)
    text = "\n".join(result_sentences(summary))
    assert "sft: 30 of 50 answered summaries (60 %, 95 % Wilson interval 46-72 %)" in text
    assert "b = 25 hallucinated only under sft, c = 0 only under dpo" in text
    assert "changes by -50.0 points" in text and "p = 6.0e-08: a difference" in text
    assert "is small" not in text


def test_a_small_n_says_what_it_cannot_show():
    summary = summary_of(["invents"] * 6 + ["clean"] * 4, ["invents"] * 2 + ["clean"] * 8)
    text = "\n".join(result_sentences(summary))
    assert "p = 0.125: no difference that this n can show" in text
    assert "n = 10 is small: 6 of 10 would already mean anything from 31 to 83 %" in text
    assert "fewer than 6 changed items" in say_small_n(10) and "about 33 items" in say_small_n(10)


def test_the_headline_never_shows_a_rate_without_count_and_interval():
    summary = summary_of(["invents"] * 6 + ["clean"] * 4, ["empty"] * 10)
    rows = headline_rows(summary)
    assert rows[0]["hallucinated summaries"] == "6 of 10 (60 %, 31-83 %)"
    assert rows[1]["hallucinated summaries"] == "not measured"
    assert rows[1]["answered"] == "0 of 10"
    table = headline_table(summary).splitlines()
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1


def test_percent_keeps_a_decimal_only_where_it_matters():
    assert [percent(x) for x in (0, 0.005, 0.0994, 0.125, 1)] == [
        "0 %", "0.5 %", "9.9 %", "12 %", "100 %",
    ]  # fmt: skip


def test_changed_items_are_sorted_by_what_happened():
    before = make_records("sft", ["invents", "invents", "clean", "clean", "clean"])
    after = make_records("dpo", ["clean", "invents", "invents", "clean", "empty"])
    found = find_changed_items(before + after, "sft", "dpo")
    ids = [note.id for note in NOTES[:5]]
    assert found == {
        "fixed": [ids[0]], "both_bad": [ids[1]], "broken": [ids[2]], "both_good": [ids[3]],
        "unanswered": [ids[4]],
    }  # fmt: skip


# --- marked text ----------------------------------------------------------------------------


def test_marked_statements_are_escaped_labelled_and_underlined():
    text = "Takes <b>x</b> & y."
    marked = highlight_statements(text, [
        {"text": "<b>x</b> & y", "start": 6, "end": 18, "kind": "medications",
         "verdict": "not_in_note", "evidence": '"quoted"'},
    ])  # fmt: skip
    assert "<b>x</b>" not in marked and "&lt;b&gt;x&lt;/b&gt; &amp; y" in marked
    assert "[not in the note]" in marked and "underline dashed" in marked
    assert "&quot;quoted&quot;" in marked


def test_a_verdict_of_another_text_is_refused():
    with pytest.raises(DataError, match="is not at 0-3"):
        highlight_statements("abcdef", [
            {"text": "xyz", "start": 0, "end": 3, "kind": "k", "verdict": "supported"},
        ])  # fmt: skip


def test_facts_are_marked_with_their_kind_and_distractors_as_such():
    marked = highlight_facts(
        "Takes aspirin. No longer takes codeine.",
        {"medications": ["aspirin"], "distractors": {"medications": ["codeine"]}},
    )
    assert "[medications]" in marked and "[medications, not now]" in marked
    assert marked.index("aspirin") < marked.index("codeine")


# --- the stage ------------------------------------------------------------------------------

SYSTEMS = ["base", "sft", "dpo", "dpo_plain"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random model of a few thousand weights: the stage does not care what it writes."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(make_notes(60, seed=1), vocab_size=512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_adapter(recipe, folder: Path, seed: int) -> None:
    model = attach_adapter(load_base_model(recipe), recipe)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    save_adapter(model, folder, recipe)


def make_trained_run(root: Path, model_dir: Path, **changes):
    """A run whose training stages are recorded, each with an adapter of random weights."""
    overrides = {
        "model.name_or_path": str(model_dir), "data.train_size": 6, "data.validation_size": 2,
        "data.test_size": 6, "evaluation.max_new_tokens": 4, "evaluation.batch_size": 1,
        "dpo.comparison_arms": ["dpo_plain"],
    }  # fmt: skip
    recipe = load_recipe("tiny-cpu", overrides | changes)
    run = Run.open(root / "run", recipe)
    prepare_data(recipe, run)
    for seed, name in enumerate(["sft", "pairs", "reference", "dpo", "comparison"]):
        for artifact in STAGES[name].outputs:
            place = run.path(artifact)
            if artifact.endswith(("adapter", "arms")):
                write_adapter(recipe, place / ("dpo_plain/adapter" * (name == "comparison")), seed)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(f"a file of stage {name}", "utf-8")
        run.record(name, recipe, {}, {})
    return recipe, run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model_dir):
    recipe, run = make_trained_run(tmp_path_factory.mktemp("evaluated"), model_dir)
    return recipe, run, evaluate_systems(recipe, run)


def test_every_system_is_judged_on_the_same_items(evaluated):
    _, _, result = evaluated
    records, generations = result.read_records(), result.read_generations()
    ids = {system: [r["id"] for r in records if r["system"] == system] for system in SYSTEMS}
    assert all(len(set(found)) == 6 and found == ids["base"] for found in ids.values())
    assert list(result.systems) == SYSTEMS
    texts = {tuple(g["text"] for g in generations if g["system"] == name) for name in SYSTEMS}
    assert len(texts) == 4  # four systems, four outputs
    assert set(result.summary) >= {
        "systems", "comparisons", "by_style", "n", "detector", "recipe", "seed", "guardrails",
    }  # fmt: skip
    assert set(result.summary["by_style"]) == {"seen", "held_out"}


def test_the_model_card_is_written_from_the_run(evaluated):
    recipe, run, result = evaluated
    card = run.path("evaluation/model_card.md").read_text("utf-8")
    assert card.startswith("---\n") and "library_name: peft" in card
    assert f"beta {recipe.dpo.beta}" in card and "train 6, validation 2, test 6" in card
    assert all(sentence in card for sentence in result_sentences(result.summary))
    assert recipe.data.prompt_template.splitlines()[0] in card
    data = ModelCard(card).data
    rate = result.summary["systems"]["dpo"]["rates"][PRIMARY]
    if rate is None:
        assert data.eval_results is None
    else:
        assert data.eval_results[0].metric_value == rate["value"]
    assert data.base_model is None  # it is a folder here, and a folder is no hub id


def test_the_metadata_of_the_card_hold_the_rate_with_its_interval():
    summary = summary_of(["invents"] * 30 + ["clean"] * 20, ["invents"] * 5 + ["clean"] * 45)
    hub = load_recipe("tiny-cpu", {"model.name_or_path": "owner/some-model"})
    data = ModelCardData(**yaml.safe_load(card_module._describe(hub, summary).to_yaml()))
    assert data.base_model == "owner/some-model"
    (metric,) = data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert (metric["type"], metric["value"]) == (PRIMARY, 0.1)
    assert metric["name"].startswith("5 of 50 answered summary (95 % Wilson 0.0435-0.2136)")


def test_a_finished_evaluation_is_reused(evaluated, capsys):
    recipe, run, result = evaluated
    assert evaluate_systems(recipe, run).summary == json.loads(json.dumps(result.summary))
    assert "evaluation: unchanged" in capsys.readouterr().out


def test_one_item_is_shown_under_two_systems(evaluated):
    _, run, result = evaluated
    item = result.read_records()[0]["id"]
    change = change_on_item(run, item, "base", "dpo")
    html = change._repr_html_()
    assert item in html and "base" in html and "dpo" in html and "<script" not in html
    assert change.before["text"] in str(change)
    with pytest.raises(DataError, match="'nobody' was not evaluated under 'sft'"):
        change_on_item(run, "nobody")


def test_an_interrupted_evaluation_continues_and_ends_the_same(
    evaluated, tmp_path, model_dir, monkeypatch
):
    recipe, run = make_trained_run(tmp_path, model_dir)
    real, prompts = evaluate.generate_summaries, []

    def stop_at_fourth_call(model, tokenizer, batch, **settings):
        prompts.append(len(batch))
        if len(prompts) == 4:
            raise KeyboardInterrupt
        return real(model, tokenizer, batch, **settings)

    monkeypatch.setattr(evaluate, "generate_summaries", stop_at_fourth_call)
    with pytest.raises(KeyboardInterrupt):
        evaluate_systems(recipe, run)
    assert "evaluation" not in run.manifest["stages"]
    work = run.checkpoint_dir("evaluation", recipe) / "base.jsonl"
    assert len(work.read_text().splitlines()) == 6  # base was done, in calls of two items
    with work.open("a") as file:
        file.write('{"id": "torn')
    prompts.clear()
    prompts += [0] * 10  # past the interruption
    result = evaluate_systems(recipe, run)
    assert sum(prompts) == 18  # sft, dpo and dpo_plain; nothing of base again
    assert result.read_generations() == evaluated[2].read_generations()


def test_generations_of_other_settings_are_never_mixed_in(tmp_path, model_dir):
    recipe, run = make_trained_run(tmp_path, model_dir)
    evaluate_systems(recipe, run)
    longer = load_recipe("tiny-cpu", recipe.to_dict() | {"evaluation.max_new_tokens": 5})
    again = evaluate_systems(longer, run).read_generations()
    assert {g["n_tokens"] for g in again} == {5}


def test_the_detector_that_made_the_pairs_does_not_report(evaluated):
    recipe, run, _ = evaluated
    same = load_recipe("tiny-cpu", recipe.to_dict() | {"evaluation.detector": "entities"})
    with pytest.raises(RecipeError, match="also judged the pairs"):
        evaluate_systems(same, run)
    check_independent_detector(recipe)
    forced = {"evaluation.force_same_detector": True}
    check_independent_detector(load_recipe("tiny-cpu", same.to_dict() | forced))


def test_a_detector_that_cannot_judge_the_data_says_so_before_generating(tmp_path, model_dir):
    path = tmp_path / "own.csv"
    rows = "".join(f"Note {i} says a thing.,A thing.\n" for i in range(60))
    path.write_text("context,reference\n" + rows)
    changes = {"data.source": "file", "data.path": str(path), "data.test_size": 5}
    recipe, run = make_trained_run(tmp_path, model_dir, **changes)
    with pytest.raises(DataError, match="fact table"):
        evaluate_systems(recipe, run)
    assert not run.checkpoint_dir("evaluation", recipe).exists()


def test_an_evaluation_that_was_not_run_names_its_notebook(tmp_path, model_dir):
    recipe = load_recipe("tiny-cpu", {"model.name_or_path": str(model_dir)})
    run = Run.open(tmp_path / "run", recipe)
    with pytest.raises(MissingArtifact, match="06_evaluation"):
        load_evaluation_result(run)


def test_a_smaller_evaluation_takes_items_of_each_style_group_in_turn():
    rows = [{"id": str(i), "style_group": "seen" if i < 6 else "held_out"} for i in range(10)]
    assert [row["id"] for row in choose_items(rows, 5)] == ["0", "6", "1", "7", "2"]
    assert len(choose_items(rows, 0)) == 10
