"""The evaluation stage: the same items for all, one model, resumed where it was interrupted."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import pytest
import torch
from base_model import build_tokenizer
from huggingface_hub import ModelCard
from tiny_nli import write_nli_model
from transformers import LlamaConfig, LlamaForCausalLM

from hallulib.clinic.notes import make_notes
from hallulib.data import prepare_data
from hallulib.data.schema import read_rows
from hallulib.detectors import Source, get_detector
from hallulib.errors import DataError, RecipeError
from hallulib.evaluation import (
    PRIMARY,
    build_summary,
    change_on_item,
    evaluate,
    evaluate_systems,
    make_record,
    outputs,
    result_sentences,
)
from hallulib.files import read_jsonl
from hallulib.models import attach_adapter, load_base_model, save_adapter
from hallulib.recipe import load_recipe
from hallulib.run import STAGES, Run

pytestmark = pytest.mark.unit
SYSTEMS = ["base", "sft", "dpo", "dpo_plain"]
REFERENCE = "Takes aspirin. No rash. Asthma."


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
    save_adapter(model, folder)


def make_trained_run(root: Path, model_dir: Path, **changes):
    """A run whose training stages are recorded, each with an adapter of random weights."""
    overrides = {
        "model.name_or_path": str(model_dir), "data.train_size": 6, "data.validation_size": 2,
        "data.test_size": 6, "evaluation.max_new_tokens": 4, "evaluation.batch_size": 2,
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


def read_rows_of(run, name):
    return read_jsonl(run.require(f"evaluation/{name}.jsonl"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model_dir):
    recipe, run = make_trained_run(tmp_path_factory.mktemp("evaluated"), model_dir)
    return recipe, run, evaluate_systems(recipe, run)


def test_every_system_is_judged_on_the_same_items(evaluated):
    _, run, result = evaluated
    records, generations = read_rows_of(run, "evaluation"), read_rows_of(run, "generations")
    ids = {system: [r["id"] for r in records if r["system"] == system] for system in SYSTEMS}
    assert all(len(set(found)) == 6 and found == ids["base"] for found in ids.values())
    assert list(result.summary["systems"]) == SYSTEMS
    texts = {tuple(g["text"] for g in generations if g["system"] == name) for name in SYSTEMS}
    assert len(texts) == 4  # four systems, four outputs
    assert set(result.summary["by_style"]) == {"seen", "held_out"}
    assert all(g["reference_tokens"] > 0 > g["reference_logp"] for g in generations)


def test_the_model_card_is_written_from_the_run(evaluated):
    recipe, run, result = evaluated
    rate = result.summary["systems"]["dpo"]["rates"][PRIMARY]
    card = run.path("evaluation/model_card.md").read_text("utf-8")
    assert card.startswith("---\n") and "library_name: peft" in card
    assert f"beta {recipe.dpo.beta}" in card and "train 6, validation 2, test 6" in card
    assert all(sentence in card for sentence in result_sentences(result.summary))
    assert recipe.data.prompt_template.splitlines()[0] in card
    data = ModelCard(card).data
    results = data.eval_results and [found.metric_value for found in data.eval_results]
    assert results == (rate and [rate["value"]])
    assert data.base_model is None  # it is a folder here, and a folder is no hub id


def test_a_finished_evaluation_is_reused(evaluated, capsys):
    recipe, run, result = evaluated
    assert evaluate_systems(recipe, run).summary == json.loads(json.dumps(result.summary))
    assert "evaluation: unchanged" in capsys.readouterr().out


def test_one_item_is_shown_under_two_systems(evaluated):
    _, run, _ = evaluated
    first = read_rows_of(run, "generations")[0]
    html = change_on_item(run, first["id"], "base", "dpo")
    assert first["id"] in html and "<b>base</b>" in html and "<b>dpo</b>" in html
    assert escape(first["text"].split()[0]) in html and "<script" not in html
    with pytest.raises(DataError, match="'nobody' was not evaluated under 'sft'"):
        change_on_item(run, "nobody")


@pytest.mark.parametrize(
    ("damage", "remade"), [(lambda lines: [*lines, b'{"id": "torn'], 0),
                           (lambda lines: [*lines[:4], b"\0\0\n", lines[5]], 2),
                           (lambda lines: [*lines[:5], lines[5].rstrip()], 1)],
    ids=["torn last line", "damage in the middle", "no line end"],
)  # fmt: skip
def test_an_interrupted_evaluation_continues_and_ends_the_same(
    evaluated, tmp_path, model_dir, monkeypatch, damage, remade
):
    recipe, run = make_trained_run(tmp_path, model_dir)
    real, prompts = outputs.generate_summaries, []

    def stop_at_fourth_call(model, tokenizer, batch, **settings):
        prompts.append(len(batch))
        if len(prompts) == 4:
            raise KeyboardInterrupt
        return real(model, tokenizer, batch, **settings)

    monkeypatch.setattr(outputs, "generate_summaries", stop_at_fourth_call)
    with pytest.raises(KeyboardInterrupt):
        evaluate_systems(recipe, run)
    assert "evaluation" not in run.manifest["stages"]
    work = run.checkpoint_dir("evaluation", recipe) / "base.jsonl"
    lines = work.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6  # base was done, in calls of two items
    work.write_bytes(b"".join(damage(lines)))
    prompts[:] = [0] * 10  # past the interruption
    evaluate_systems(recipe, run)
    assert sum(prompts) == 18 + remade  # sft, dpo and dpo_plain; of base what was damaged
    assert read_rows_of(run, "generations") == read_rows_of(evaluated[1], "generations")


class StoppingDetector:
    """The rules, with a count of calls and an interruption at one of them."""

    name = "entities"

    def __init__(self, stop_at: int) -> None:
        self.calls, self.stop_at, self.rules = 0, stop_at, get_detector("entities")

    def judge(self, source, summary):
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return self.rules.judge(source, summary)


def test_an_interrupted_judge_goes_on_where_it_was(evaluated, tmp_path, monkeypatch):
    _, run, _ = evaluated
    rows, written = read_rows(run.path("data/test.parquet")), read_rows_of(run, "generations")
    monkeypatch.setattr(evaluate, "JUDGED", 5)
    with pytest.raises(KeyboardInterrupt):
        evaluate.judge_all(StoppingDetector(25), rows, written, tmp_path / "w.jsonl")
    second = StoppingDetector(0)
    continued = evaluate.judge_all(second, rows, written, tmp_path / "w.jsonl")
    assert (len(written), second.calls) == (24, 28)  # two chunks were on the disk; two calls each
    fresh = evaluate.judge_all(second, rows, written, tmp_path / "fresh.jsonl")
    assert json.loads(json.dumps(fresh)) == json.loads(json.dumps(continued))


def test_an_entailment_model_reports_and_only_by_its_name(tmp_path, model_dir):
    nli = write_nli_model(tmp_path / "tiny-nli", steps=1)
    changes = {"evaluation.detector": "nli", "evaluation.nli_model": str(nli)}
    recipe, run = make_trained_run(tmp_path, model_dir, **changes, **{"evaluation.notes": 2})
    result = evaluate_systems(recipe, run)
    assert result.summary["detector"] == "nli:tiny-nli"
    verdicts = {s["verdict"] for r in read_rows_of(run, "evaluation") for s in r["statements"]}
    assert verdicts <= {"supported", "contradicted", "not_in_note", "unparsed"}
    for name in ("summary.json", "report.html", "model_card.md", "evaluation.jsonl"):
        assert str(tmp_path) not in (run.path("evaluation") / name).read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "left_out"),
    [("Takes aspirin. No rash.", ["Asthma"]), ("Takes aspirin. No rash. Asthma.", []),
     ("", ["Takes aspirin", "No rash", "Asthma"]), ("Rash. Asthma.", ["Takes aspirin", "No rash"])],
)  # fmt: skip
def test_a_detector_without_facts_finds_what_of_the_reference_was_left_out(text, left_out):
    generation = {"text": text, "reference": REFERENCE}
    judged = evaluate.judge_one(get_detector("entities"), Source(REFERENCE), generation)
    assert (judged.omissions, judged.stated) == (left_out, 3)
    assert judged.stated_unit == "statements of the reference"
    generation["reference"] = " "
    judged = evaluate.judge_one(get_detector("entities"), Source(REFERENCE), generation)
    assert judged.stated == 0


def test_omissions_turn_the_guardrail_red_also_without_a_fact_table():
    records = []
    for system, text in (("sft", REFERENCE + " Had a stroke."), ("dpo", "No rash.")):
        row = {"text": text, "reference": REFERENCE, "system": system, "style": "",
               "style_group": "", "n_tokens": 5, "finish_reason": "stop"}  # fmt: skip
        judged = evaluate.judge_one(get_detector("entities"), Source(REFERENCE), row)
        ids = ({"id": str(item), "group_id": str(item)} for item in range(20))
        records += [make_record(row | names, judged) for names in ids]
    summary = build_summary(records)
    rate = summary["systems"]["dpo"]["rates"]["omission_rate"]
    assert (rate["value"], rate["unit"]) == (2 / 3, "statements of the reference")
    assert "omission_rate" in {g["name"] for g in summary["guardrails"] if not g["ok"]}
    text = "\n".join(result_sentences(summary))
    assert "left out of what should be said 0 % to 67 %: the lower rate was bought with it" in text
    assert "left out 40 of 60 statements of the reference (67 %" in text
    assert "The detector entities errs" in text


def test_items_that_cannot_be_told_apart_are_refused():
    with pytest.raises(DataError, match="test.parquet has the id 'a' more than once"):
        evaluate.choose_items([{"id": "a"}] * 2, 0)


def test_a_prompt_beyond_the_models_context_is_refused_before_generating(tmp_path, model_dir):
    recipe, run = make_trained_run(tmp_path, model_dir, **{"evaluation.max_new_tokens": 1000})
    with pytest.raises(DataError, match=r"test item '.*' has \d+ tokens; with 1000 new"):
        evaluate_systems(recipe, run)


def test_generations_of_other_settings_are_never_mixed_in(tmp_path, model_dir):
    recipe, run = make_trained_run(tmp_path, model_dir)
    evaluate_systems(recipe, run)
    longer = load_recipe("tiny-cpu", recipe.to_dict() | {"evaluation.max_new_tokens": 5})
    evaluate_systems(longer, run)
    assert {g["n_tokens"] for g in read_rows_of(run, "generations")} == {5}


def test_the_detector_that_made_the_pairs_does_not_report(evaluated):
    recipe, run, _ = evaluated
    same = load_recipe("tiny-cpu", recipe.to_dict() | {"evaluation.detector": "entities"})
    with pytest.raises(RecipeError, match="also judged the pairs"):
        evaluate_systems(same, run)
    forced = {"evaluation.force_same_detector": True}
    found = evaluate_systems(load_recipe("tiny-cpu", same.to_dict() | forced), run)
    assert any(s.startswith("CAUTION") for s in result_sentences(found.summary))


def test_a_detector_that_cannot_judge_the_data_says_so_before_generating(tmp_path, model_dir):
    path = tmp_path / "own.csv"
    path.write_text("context,reference\n" + "".join(f"Note {i}.,A thing.\n" for i in range(60)))
    changes = {"data.source": "file", "data.path": str(path), "data.test_size": 5}
    recipe, run = make_trained_run(tmp_path, model_dir, **changes)
    with pytest.raises(DataError, match="fact table"):
        evaluate_systems(recipe, run)
    assert not run.checkpoint_dir("evaluation", recipe).exists()


def test_a_smaller_evaluation_takes_items_of_each_style_group_in_turn():
    rows = [{"id": str(i), "style_group": "seen" if i < 6 else "held_out"} for i in range(10)]
    assert [row["id"] for row in evaluate.choose_items(rows, 5)] == ["0", "6", "1", "7", "2"]
    assert len(evaluate.choose_items(rows, 0)) == 10
