"""The memory budget: predictions, and the stage that writes them down."""

import json

import huggingface_hub
import pandas as pd
import pytest
from tiny_memory import make_config, recipe_of
from transformers import AutoConfig

from hallulib.errors import HallulibError, MissingArtifact
from hallulib.memory import (
    LARGE,
    STRATEGIES,
    Explorer,
    load_model_config,
    peak,
    predict_budget,
    predict_large,
    predict_peak,
)
from hallulib.memory.budget import load_budget
from hallulib.memory.explorer import TWO
from hallulib.memory.peak import GIB, TERMS
from hallulib.memory.skeleton import SHIPPED
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"
QWEN = "Qwen/Qwen2.5-0.5B-Instruct"


def test_nf4_weights_and_constants_have_the_published_size():
    terms = predict_large(LARGE, "cached_reference_pass1", 256).terms
    size = terms["base_weights"] + terms["quantisation_constants"]
    assert round(size / 1e9, 2) == 5.70


def test_two_4_bit_mistrals_fit_12_gib_and_two_4_bit_llamas_do_not():
    assert predict_large(MISTRAL, "dual_4bit", 512, replay=True).fits(12)
    assert not predict_large(LARGE, "dual_4bit", 512).fits(12)  # what lives is too much already


def test_the_peak_is_the_sum_of_its_terms():
    budget = predict_large(LARGE, "cached_reference_pass2", 512, replay=True)
    assert set(budget.terms) == {*TERMS, "allocator_slack", "cuda_context"}
    assert budget.allocated <= budget.needed <= budget.reserved
    assert budget.total == budget.reserved + budget.terms["cuda_context"]
    assert budget.terms["gradients"] == budget.terms["lora_weights"] > 4 * 41_000_000
    assert budget.fits(10) and not budget.fits(7)
    live = predict_large(LARGE, "cached_reference_pass2", 512)
    assert live.terms == budget.terms | {"allocator_slack": 0}
    with pytest.raises(HallulibError, match="Only a replay"):
        live.fits(10)


def test_what_caching_and_copies_and_checkpointing_do_to_an_8b():
    def live(strategy, **asked):
        return predict_large(LARGE, strategy, 512, **asked)

    cached = live("cached_reference_pass2")
    assert live("dual_model").total > 30 * GIB and not live("dual_model").fits(24)
    assert live("adapter_copy").total < 1.05 * cached.total
    assert live("cached_reference_pass2", checkpointing=False).total > 1.5 * cached.total
    assert live("reference_on_cpu").terms == cached.terms


def deep_config(kind="llama", **changes):
    return make_config(kind, **{"num_hidden_layers": 10} | changes)


def assert_shallow_models_tell(monkeypatch, config, plan, layers, **model):
    """The live bytes of the whole model, from models of so many `layers`."""
    trace, seen = peak.trace_pass, []

    def note_depth(recipe, plan, shape, config):
        seen.append(config.num_hidden_layers)
        return trace(recipe, plan, shape, config)

    monkeypatch.setattr(peak, "trace_pass", note_depth)
    recipe = recipe_of(config, {"model": {"dtype": "bfloat16"} | model})
    live = predict_peak(recipe, plan, tokens=96, rows=4, replay=False)
    assert seen == layers
    whole = predict_peak(recipe, plan, tokens=96, rows=4)
    assert live.terms == whole.terms | {"allocator_slack": 0}


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_two_three_and_four_layers_tell_what_ten_take(monkeypatch, quantization, checkpointing):
    settings = {"quantization": quantization, "gradient_checkpointing": checkpointing}
    plan = "cached_reference_pass2"
    assert_shallow_models_tell(monkeypatch, deep_config(), plan, [2, 3, 4], **settings)


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "qwen3", "phi3", "mixtral", "starcoder2"])
def test_so_they_do_in_other_families(monkeypatch, kind):
    assert_shallow_models_tell(monkeypatch, deep_config(kind), "sft", [2, 3, 4])


def test_a_model_whose_layers_differ_is_traced_whole(monkeypatch):
    config = deep_config("gemma3_text", sliding_window=32)
    assert len(set(config.layer_types)) == 2
    assert_shallow_models_tell(monkeypatch, config, "sft", [10])
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = deep_config("qwen3_moe", **moe, decoder_sparse_step=5)
    monkeypatch.undo()
    assert_shallow_models_tell(monkeypatch, config, "sft", [10])


def test_where_the_gradients_of_many_layers_outgrow_what_a_few_need_it_is_seen():
    """Short rows and a high rank: of few layers the logits are the peak, of 24 the end of the
    backward pass, when all gradients are there."""
    settings, phases = {"lora.r": 64, "model.gradient_checkpointing": True}, {}
    for layers in (5, 24):
        config = deep_config(num_hidden_layers=layers, vocab_size=20_000)
        recipe = recipe_of(config, settings)
        live = predict_peak(recipe, "sft", tokens=24, rows=1, replay=False)
        whole = predict_peak(recipe, "sft", tokens=24, rows=1)
        assert live.terms == whole.terms | {"allocator_slack": 0}
        phases[layers] = live.phase
    assert phases == {5: "backward", 24: "backward, first layer"}


def test_three_layers_off_the_line_are_not_believed():
    peaks = [pd.DataFrame({"forward": {"logits": size}}) for size in (10, 20, 30)]
    assert peak.extend_peaks(peaks, 10).to_dict() == {"forward": {"logits": 90}}
    assert peak.extend_peaks([*peaks[:2], peaks[2] + 1], 10) is None
    other = [frame.rename(columns={"forward": "backward"}) for frame in peaks]
    assert peak.extend_peaks([peaks[0], other[1], peaks[2]], 10) is None


def test_the_same_question_is_answered_once(monkeypatch):
    recipe = recipe_of(make_config())
    first = predict_peak(recipe, "sft", rows=3)
    monkeypatch.setattr(peak, "trace_pass", None)
    assert predict_peak(recipe, "sft", rows=3) == first
    first.terms["base_weights"] = 0  # of this answer, not of the next
    assert predict_peak(recipe, "sft", rows=3).terms["base_weights"] > 0


def test_a_model_that_does_not_run_fake_is_refused_in_plain_words(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("data-dependent branch")

    monkeypatch.setattr(peak, "trace_pass", fail)
    with pytest.raises(HallulibError, match="cannot be traced .*RuntimeError: data-dependent"):
        predict_peak(recipe_of(make_config()), "sft", rows=5)


def test_bad_input_is_named():
    with pytest.raises(HallulibError, match="9000 tokens are more than the 8192 positions"):
        predict_large(LARGE, "sft", 9000)
    with pytest.raises(HallulibError, match="makes no decoder"):
        predict_peak(recipe_of(AutoConfig.for_model("vit")), "sft")
    with pytest.raises(HallulibError, match="no_such_layer"):
        predict_peak(recipe_of(make_config(), {"lora.target_modules": ["no_such_layer"]}), "sft")


def test_the_explorer_shows_what_the_controls_say():
    view = Explorer(QWEN, 512, card_gb=12)
    view.strategies.value = [TWO, "cached reference, pass 2: training"]
    pictures = [bytes(view.picture.value)]
    for name, value in {"tokens": 256, "rows": 2, "quantization": "none"}.items():
        view.asked[name].value = value
        pictures.append(bytes(view.picture.value))
    assert len(set(pictures)) == 4 and all(p.startswith(b"\x89PNG") for p in pictures)


def test_an_unknown_model_is_named_without_touching_the_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HallulibError, match="No configuration of 'nobody/nothing'"):
        load_model_config("nobody/nothing")
    assert {LARGE, MISTRAL, QWEN} < set(SHIPPED)  # needs none


def make_run(tmp_path):
    """A run whose data stage is recorded, for a model given as a folder with a config alone."""
    recipe = recipe_of(make_config(), device="cpu")
    run = Run.open(tmp_path / "run", recipe)
    run.path("data").mkdir()
    for name in ("train", "validation", "test"):
        run.path(f"data/{name}.parquet").write_text(name)
    run.path("data/audit.json").write_text(json.dumps(AUDIT))
    run.record("data", recipe, {}, {})
    return recipe, run


AUDIT = {"splits": {"train": {"total_tokens": {"max": 333}, "reference_tokens": {"max": 80}}}}


def test_the_stage_writes_predictions_for_the_longest_row_and_for_the_large_models(tmp_path):
    recipe, run = make_run(tmp_path)
    result = predict_budget(recipe, run)
    own, large = ({b.strategy: b for b in result[name]} for name in ("own", "large"))
    assert own.keys() == STRATEGIES.keys()
    assert own["dual_4bit"].tokens == 333
    assert own["sft"] == predict_peak(recipe, "sft", tokens=333, completion=80)
    assert own["sft"].terms["cuda_context"] == 0  # the recipe runs on the CPU
    assert load_budget(run) == result
    assert not large["dual_model"].fits(24) and large["dual_model"].total > 30 * GIB


def test_the_budget_of_a_run_without_data_is_refused(tmp_path):
    recipe = load_recipe("tiny-cpu")
    with pytest.raises(MissingArtifact, match="01_data_prep"):
        predict_budget(recipe, Run.open(tmp_path, recipe))
