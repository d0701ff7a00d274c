"""The same step on fake and on real tensors: the predicted bytes are the real ones, to the byte."""

import json

import pytest
import torch
from tiny_memory import make_config, recipe_of
from tiny_model import write_base_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from hallulib import scoring
from hallulib.checkpoints import Log
from hallulib.errors import HallulibError
from hallulib.memory import (
    STRATEGIES,
    StorageTracker,
    check_on_this_machine,
    follow_model,
    load_model_config,
    predict_peak,
)
from hallulib.memory.passes import StepShape, trace_pass
from hallulib.models import attach_adapter, load_base_model
from hallulib.recipe import load_recipe
from hallulib.sft import TokenRow, make_task
from hallulib.training import train

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base_model(tmp_path_factory.mktemp("base"), num_hidden_layers=3, hidden_size=64)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 400 * 16)  # so that there are several


def make_recipe(base, **changes):
    model = {"name_or_path": str(base), "max_length": 256, "device": "cpu"} | changes
    return load_recipe("tiny-cpu", {"model": model, "pairs.samples_per_note": 2})


def both_traces(base, plan, shape, **changes):
    asked = make_recipe(base, **changes), STRATEGIES[plan], shape
    return trace_pass(*asked, load_model_config(str(base))), trace_pass(*asked)


def assert_equal_to_the_byte(fake, real):
    assert fake.find_peak() == real.find_peak() > 1_000_000
    assert fake.events.count(1) == 1 and sum(fake.sizes) > 2 * fake.find_peak()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_predicted_dpo_peak_is_the_real_one_to_the_byte(
    base, quantization, dtype, checkpointing
):
    settings = {"quantization": quantization, "dtype": dtype}
    settings["gradient_checkpointing"] = checkpointing
    shape = StepShape(2, 96, 40, shared=True)
    assert_equal_to_the_byte(*both_traces(base, "cached_reference_pass2", shape, **settings))


@pytest.mark.parametrize("plan", ["sft", "cached_reference_pass2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_with_every_attention(base, attention, plan):
    shape = StepShape(3, 90, 30)
    settings = {"attention": attention, "dtype": "bfloat16"}
    assert_equal_to_the_byte(*both_traces(base, plan, shape, **settings))


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("plan", [n for n, s in STRATEGIES.items() if s.quantization is None])
def test_it_is_with_every_strategy_and_layout(base, plan, shared):
    shape = StepShape(4, 96, 40, shared=shared and STRATEGIES[plan].runs in ("dpo", "reference"))
    assert_equal_to_the_byte(*both_traces(base, plan, shape, gradient_checkpointing=True))


def test_it_is_with_two_models_and_with_biases_and_a_sliding_window(tmp_path):
    folder = write_base_model(tmp_path / "base", hidden_size=64, attention_bias=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 24}))
    shape = StepShape(2, 96, 40, shared=True)
    found = both_traces(folder, "dual_4bit", shape, quantization="nf4", dtype="bfloat16")
    assert_equal_to_the_byte(*found)


def test_predict_peak_returns_that_peak_and_names_every_byte_of_it(base):
    recipe = make_recipe(base)
    budget = predict_peak(recipe, "sft", rows=3, tokens=90, completion=30)
    real = trace_pass(recipe, STRATEGIES["sft"], StepShape(3, 90, 30))
    assert budget.total == budget.allocated == budget.needed == real.find_peak()
    lora = sum(size for size, label in zip(real.sizes, real.labels, strict=True)
               if label == "lora_weights")  # fmt: skip
    assert budget.terms["lora_weights"] == lora > 0
    assert budget.terms["optimiser_states"] == pytest.approx(2 * lora, rel=0.01)
    assert budget.terms["allocator_slack"] == budget.terms["cuda_context"] == 0


@pytest.mark.parametrize("plan", [n for n, s in STRATEGIES.items() if s.reference != "host"])
def test_a_deep_model_is_predicted_from_shallow_ones_to_the_byte(plan, tmp_path):
    """Here all is told from two, three and four layers, and a reference is only added."""
    quantization = STRATEGIES[plan].quantization or "nf4"
    deep = write_base_model(tmp_path / "deep", num_hidden_layers=9, hidden_size=64)
    recipe = make_recipe(deep, quantization=quantization, gradient_checkpointing=True)
    budget, measured = check_on_this_machine(recipe, plan, 96, 40)
    assert budget.total == measured > 500_000


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_real_training_takes_what_is_predicted(base, tmp_path, accumulation):
    sft = {"batch_size": 4, "max_steps": 3, "gradient_accumulation": accumulation}
    recipe = make_recipe(base, gradient_checkpointing=True)
    recipe = recipe.model_copy(update={"sft": recipe.sft.model_copy(update=sft)})
    rows = [TokenRow([5] * 60, [6] * 36)] * 24
    model = attach_adapter(load_base_model(recipe), recipe)
    with StorageTracker(model.config.vocab_size) as tracker:
        follow_model(tracker, model)
        train(model, make_task(rows, rows[:1], 0), recipe.sft, Log(tmp_path), recipe.seed)
    budget = predict_peak(recipe, "sft", tokens=96, completion=36)
    # The loop holds a few numbers more: token ids of the batch, loss, gradient norm.
    assert tracker.trace.find_peak() == pytest.approx(budget.total, rel=0.005)


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "qwen3", "mixtral", "gemma3_text", "starcoder2"])
def test_decoders_of_every_family_are_traced(kind):
    gpt2 = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=300)
    config = gpt2 if kind == "gpt2" else make_config(kind)
    budget = predict_peak(recipe_of(config, {"model.dtype": "bfloat16"}), "sft", tokens=64, rows=2)
    assert budget.terms["activations"] > 0 and budget.reserved >= budget.allocated


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_an_encoder_is_refused(kind):
    with pytest.raises(HallulibError, match="encoder"):
        predict_peak(recipe_of(AutoConfig.for_model(kind)), "sft", tokens=64)


def test_an_independent_witness_sees_the_same_allocations(base):
    """PyTorch's profiler watches the CPU allocator itself, scratch inside operators included."""
    asked = make_recipe(base), STRATEGIES["cached_reference_pass2"], StepShape(8, 200, 100)
    peak = trace_pass(*asked).find_peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as witness:
        trace_pass(*asked)
    events = witness.profiler.kineto_results.events()
    totals, total = [0], 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            totals.append(total)
    assert max(totals) == pytest.approx(peak, rel=0.03)  # it also sees the weights being loaded


def test_the_tracker_sees_views_once_and_forgets_what_is_gone():
    with StorageTracker() as tracker:
        a = torch.zeros(1000)
        b = a[:10].view(2, 5) + 1
        del a
        c = torch.zeros(500)
    assert tracker.trace.find_peak() == 4000 + 40
    assert {tracker.trace.sizes[i] for i in tracker.trace.list_alive(4)} == {40, 2000}
    assert b.shape and c.shape


def test_int8_keeps_its_inputs_although_checkpointing_is_on(base):
    """bitsandbytes keeps them outside of what non-reentrant checkpointing can drop."""
    settings = {"dtype": "bfloat16", "gradient_checkpointing": True, "device": "cuda"}
    kept = {}
    for quantization in ("nf4", "int8"):
        recipe = make_recipe(base, quantization=quantization, **settings)
        plan, shape = STRATEGIES["cached_reference_pass2"], StepShape(4, 128, 64)
        trace = trace_pass(recipe, plan, shape, load_model_config(str(base)))
        start, end = trace.list_phases()["forward"]
        born = trace.list_born(start, end) & trace.list_alive(end)
        kept[quantization] = sum(trace.sizes[i] for i in born if trace.labels[i] != "logits")
    assert kept["int8"] > 2 * kept["nf4"]
