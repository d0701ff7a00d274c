"""The memory budget: exact counts, and peaks against traces and published measurements."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hallulib.errors import HallulibError, MissingArtifact
from hallulib.memory import (
    STRATEGIES,
    MemoryBudget,
    case,
    count_parameters,
    explorer,
    load_budget_result,
    load_model_config,
    peak,
    predict_budget,
    predict_peak,
)
from hallulib.memory.peak import GIB, TERMS
from hallulib.memory.prediction_cache import PredictionCache, read_shipped
from hallulib.memory.table import list_large, list_shipped, make_large_recipe, predict_large
from hallulib.recipe import LoraSection, load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit

QV = ["q_proj", "v_proj"]
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_the_first_published_count_is_a_llama_3_8b_with_rank_16_on_q_and_v():
    counts = count_parameters(load_model_config("llama-3-8b"), LoraSection(r=16, target_modules=QV))
    assert (counts.total, counts.lora) == (8_037_076_992, 6_815_744)


def test_the_published_4_bit_count_is_the_same_shape_counted_through_packed_storage():
    counts = count_parameters(
        load_model_config("llama-3-8b"), LoraSection(r=16, target_modules=QKVO)
    )
    assert (counts.packed_total, counts.lora) == (4_554_231_808, 13_631_488)
    assert f"{counts.lora / counts.packed_total:.2%}" == "0.30%"  # as the reports print it
    assert f"{counts.lora / counts.total:.2%}" == "0.17%"


def test_mistral_7b_gives_other_totals_so_the_reports_did_not_train_one():
    lora = LoraSection(r=16, target_modules=QV)
    config = load_model_config("mistral-7b")
    assert count_parameters(config, lora).total == 7_254_839_296
    config.vocab_size = 32_000  # v0.1
    assert count_parameters(config, lora).total == 7_248_547_840
    assert count_parameters(config, LoraSection(r=16, target_modules=QKVO)).packed_total == (
        3_765_702_656
    )


def test_tied_embeddings_are_counted_once():
    counts = count_parameters(load_model_config("qwen2.5-0.5b"), LoraSection())
    assert counts.base == 494_032_768


@pytest.mark.parametrize("targets", ["all-linear", QV, ["mlp.up_proj"], r".*layers\.0\..*_proj"])
def test_the_adapter_has_the_size_that_peft_gives_it(targets):
    config = tiny_config()
    lora = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    counts = count_parameters(config, LoraSection(r=3, target_modules=targets))
    assert (counts.lora, counts.total) == model.get_nb_trainable_parameters()


def test_nf4_weights_and_constants_have_the_published_size():
    counts = count_parameters(load_model_config("llama-3-8b"), LoraSection())
    size = counts.base_bytes("nf4", 2) + counts.constant_bytes("nf4")
    assert round(size / 1e9, 2) == 5.70
    assert counts.base_bytes("none", 2) == 2 * counts.base
    assert counts.constant_bytes("none") == 0


def tiny_config(**sizes):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return AutoConfig.for_model(
        "llama", vocab_size=99, num_attention_heads=4, num_key_value_heads=2, **small | sizes
    )


def test_two_4_bit_mistrals_fit_12_gib_and_two_4_bit_llamas_do_not():
    fits = {}
    for model in ("mistralai/Mistral-7B-Instruct-v0.3", "meta-llama/Meta-Llama-3-8B-Instruct"):
        fits[model] = predict_large(model, "dual_4bit", 512).fits(12)
    assert list(fits.values()) == [True, False]


def test_a_shipped_prediction_is_what_this_code_predicts(tmp_path):
    asked = {"model": "Qwen/Qwen2.5-0.5B-Instruct", "strategy": "dual_8bit", "tokens": 512}
    assert predict_large(**asked) == predict_large(**asked, cache=PredictionCache(tmp_path))


def test_every_large_prediction_ships():
    class Nothing(PredictionCache):
        def put(self, key, values):
            raise AssertionError("not shipped: run `python -m hallulib.memory.table`")

    cache = Nothing(Path("nowhere"), read_shipped())
    budgets = [predict_large(**asked, cache=cache) for asked in list_large()]
    assert {b.method for b in budgets} == {"traced"} and len(budgets) == len(list(list_large()))
    by_name = {(b.model, b.strategy, b.sequence_tokens, b.checkpointing): b for b in budgets}
    llama = "meta-llama/Meta-Llama-3-8B-Instruct"
    cached = by_name[llama, "cached_reference_pass2", 512, True]
    assert cached.fits(10) and not by_name[llama, "dual_model", 512, True].fits(24)
    assert by_name[llama, "adapter_copy", 512, True].total < 1.05 * cached.total
    assert by_name[llama, "cached_reference_pass2", 2048, False].total > 2 * cached.total
    assert by_name[llama, "reference_on_cpu", 512, True].host > 5 * GIB


def test_what_the_sliders_reach_ships():
    known, shipped = read_shipped(), list(list_shipped())
    rows = [values for values in known.values() if values["rows"] == 4]
    assert {v["quantization"] for v in rows} == {"none", "int8", "nf4"}
    assert len(shipped) > len(known) > 800


def test_the_peak_is_the_sum_of_its_terms(tmp_path):
    budget = predict_large("meta-llama/Meta-Llama-3-8B-Instruct", "cached_reference_pass2", 512)
    assert set(budget.terms) == set(TERMS) and budget.total == sum(budget.terms.values())
    assert budget.allocated <= budget.needed <= budget.reserved
    assert budget.total == budget.reserved + budget.terms["cuda_context"]
    assert budget.terms["gradients"] == budget.terms["lora_weights"] > 4 * 41_000_000
    assert MemoryBudget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget


def test_cached_reference_is_the_larger_of_its_passes_and_the_first_trains_nothing(tmp_path):
    config, recipe = tiny_config(), load_recipe("tiny-cpu")
    names = ("cached_reference", "cached_reference_pass1", "cached_reference_pass2")
    cache = PredictionCache(tmp_path)
    whole, first, second = (
        predict_peak(config, recipe, name, cache=cache, device="cpu") for name in names
    )
    assert whole == max(first, second, key=lambda b: b.total)
    assert first.terms["gradients"] == first.terms["optimiser_states"] == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_a_prediction_is_made_once(tmp_path, monkeypatch):
    config, recipe, cache = tiny_config(), load_recipe("tiny-cpu"), PredictionCache(tmp_path)
    first = predict_peak(config, recipe, "sft", cache=cache)
    monkeypatch.setattr(peak, "trace_strategy", None)
    assert predict_peak(config, recipe, "sft", cache=cache) == first
    slower = load_recipe("tiny-cpu", {"sft.learning_rate": 1e-5, "name": "other"})
    assert predict_peak(config, slower, "sft", cache=cache) == first
    (file,) = tmp_path.iterdir()
    file.write_text("{torn")
    assert cache.get(file.stem) is None


def test_a_model_that_does_not_run_fake_gets_an_estimate_that_says_so(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("data-dependent branch")

    monkeypatch.setattr(peak, "trace_strategy", fail)
    config = load_model_config("llama-3-8b")
    recipe = make_large_recipe("llama-3-8b")
    cache = PredictionCache(tmp_path)
    budget = predict_peak(config, recipe, "sft", sequence_tokens=512, cache=cache)
    assert budget.method.startswith("analytic: the model does not run fake (RuntimeError: data")
    traced = predict_large("meta-llama/Meta-Llama-3-8B-Instruct", "cached_reference_pass2", 512)
    assert budget.total == pytest.approx(traced.total, rel=0.2)


def test_bad_input_is_named():
    config, recipe = load_model_config("llama-3-8b"), load_recipe("tiny-cpu")
    with pytest.raises(HallulibError, match="no strategy 'dual'"):
        predict_peak(config, recipe, "dual")
    with pytest.raises(HallulibError, match="no head 'half'"):
        predict_peak(config, recipe, head="half")
    with pytest.raises(HallulibError, match="9000 tokens are more than the 8192 positions"):
        predict_peak(config, recipe, sequence_tokens=9000)
    with pytest.raises(HallulibError, match="is that of an encoder"):
        predict_peak(AutoConfig.for_model("t5"), recipe)
    with pytest.raises(HallulibError, match="makes no decoder"):
        predict_peak(AutoConfig.for_model("vit"), recipe)
    with pytest.raises(HallulibError, match="no layer called .*no_such_layer"):
        count_parameters(config, LoraSection(target_modules=["no_such_layer"]))


def test_every_statement_of_the_case_is_judged_by_a_number():
    statements = case.check_statements()
    assert not [s for s in statements if "look into it" in s.verdict] and len(statements) == 9
    by_report = {s.report: s for s in statements}
    assert "15.61 GB" in by_report["two 4-bit models take 15.80 GB"].computed
    assert "26.5 days" in by_report["one epoch on the CPU: 26.5 days"].computed
    wrong = [s.report for s in statements if s.verdict.startswith("wrong")]
    assert "DPO needs two models, or a stored reference" in wrong


def test_the_explorer_redraws_from_what_is_known_and_computes_the_rest_when_asked(
    tmp_path, monkeypatch
):
    shipped = read_shipped()
    monkeypatch.setattr(PredictionCache, "default", classmethod(lambda c: c(tmp_path, shipped)))
    view = explorer.Explorer(explorer.Setting(case.LLAMA, 1024), card_gb=12)
    pictures = [bytes(view.picture.value)]
    qwen = "Qwen/Qwen2.5-0.5B-Instruct"
    changes = {"model": qwen, "tokens": 512, "rows": 2, "quantization": "none"}
    for name, value in changes.items():
        view.controls[name].value = value
        pictures.append(bytes(view.picture.value))
    assert len(set(pictures)) == 5 and all(p.startswith(b"\x89PNG") for p in pictures)
    assert view.button.layout.visibility == "hidden"
    assert view.strategies[0] == "dual_model"
    view.controls["strategies"].value = [explorer.TWO, "cached reference, pass 1: reference"]
    view.controls["quantization"].value = "int8"
    view.controls["checkpointing"].value = False  # which does not ship for int8
    assert view.button.layout.visibility == "visible" and not list(tmp_path.iterdir())
    view.controls["strategies"].value = ["cached reference, pass 1: reference"]
    view.predict_missing()
    assert view.button.layout.visibility == "hidden" and len(list(tmp_path.iterdir())) == 1
    assert bytes(view.picture.value).startswith(b"\x89PNG")


def test_an_unknown_model_is_named_without_touching_the_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HallulibError, match="No configuration of 'nobody/nothing'"):
        load_model_config("nobody/nothing")


def make_run(tmp_path, audit):
    """A run whose data stage is recorded, for a model given as a folder with a config alone."""
    values = json.loads(load_model_config("qwen2.5-0.5b").to_json_string())
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    drop = {"head_dim", "layer_types"}
    kept = {k: v for k, v in values.items() if k not in drop} | small
    (folder / "config.json").write_text(json.dumps(kept))
    recipe = load_recipe("tiny-cpu", {"model.name_or_path": str(folder)})
    run = Run.open(tmp_path / "run", recipe)
    run.path("data").mkdir()
    for name in ("train", "validation", "test"):
        run.path(f"data/{name}.parquet").write_text(name)
    run.path("data/audit.json").write_text(json.dumps(audit))
    run.record("data", recipe, {}, {})
    return recipe, run


AUDIT = {"splits": {"train": {"total_tokens": {"max": 333}, "reference_tokens": {"max": 80}}}}


def test_the_stage_writes_predictions_for_the_longest_row_and_for_the_large_models(tmp_path):
    recipe, run = make_run(tmp_path, AUDIT)
    result = predict_budget(recipe, run)
    assert {b.strategy for b in result.own} == set(STRATEGIES)
    by_name = {b.strategy: b for b in result.own}
    assert by_name["dual_4bit"].sequence_tokens == 333
    assert by_name["dual_4bit"].completion_tokens == 80
    assert by_name["dual_4bit"].terms["cuda_context"] == 0  # the recipe runs on the CPU
    assert len(result.shapes) == len(list(list_large()))
    assert load_budget_result(run) == result
    written = json.loads(run.path("budget/budget.json").read_text())
    rows = {
        (r["model"], r["strategy"], r["sequence_tokens"]): r["fits"]["12"]
        for r in written["shapes"] if r["checkpointing"]
    }  # fmt: skip
    llama = "meta-llama/Meta-Llama-3-8B-Instruct"
    assert rows[llama, "cached_reference_pass2", 512] and not rows[llama, "dual_model", 512]
    assert result.find(llama, "dual_model", 512).total > 30 * GIB


def test_without_token_counts_the_recipes_max_length_is_used_and_said(tmp_path):
    recipe, run = make_run(tmp_path, {})
    result = predict_budget(recipe, run)
    assert result.tokens == {"sequence": 512, "completion": 256, "source": "model.max_length"}


def test_the_budget_of_a_run_without_data_is_refused(tmp_path):
    recipe = load_recipe("tiny-cpu")
    with pytest.raises(MissingArtifact, match="01_data_prep"):
        predict_budget(recipe, Run.open(tmp_path, recipe))
