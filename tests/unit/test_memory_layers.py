"""A deep model's trace from shallow ones is the one that tracing all its layers gives."""

from collections import Counter

import pytest
from transformers import AutoConfig

from hallulib.memory import allocator, layers
from hallulib.memory.peak import Question, list_terms, make_shape
from hallulib.memory.strategies import STRATEGIES
from hallulib.memory.tracing import Levers, trace_strategy
from hallulib.recipe import load_recipe

pytestmark = pytest.mark.unit

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10, "vocab_size": 300,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


def make_tracer(plan, optimizer="", **model):
    recipe = load_recipe("tiny-cpu", {"model": {"dtype": "bfloat16"} | model})
    strategy, seen = STRATEGIES[plan], []

    def trace(config):
        seen.append(config.num_hidden_layers)
        shape = make_shape(config, recipe, strategy, Question(plan, sequence_tokens=96, rows=4))
        return trace_strategy(config, recipe, strategy, shape, Levers(optimizer=optimizer))

    return trace, seen


def assert_extended_is_whole(config, plan, **settings):
    trace, seen = make_tracer(plan, **settings)
    whole, extended = trace(config), layers.trace_by_layers(trace, config)
    assert seen == [10, *layers.SHALLOW]  # the shallow ones were enough
    assert extended.sizes == whole.sizes and extended.labels == whole.labels
    assert extended.phases == whole.phases and extended.marks == whole.marks
    assert list_terms(extended) == list_terms(whole)
    replays = [allocator.list_requests(t) for t in (extended, whole)]
    found = [allocator.replay(requests) for requests in replays]
    assert found[0].peak_allocated == found[1].peak_allocated > 0
    assert found[0].peak_reserved == found[1].peak_reserved


@pytest.mark.parametrize("plan", STRATEGIES)
def test_every_strategy(plan):
    config = AutoConfig.for_model("llama", **SIZES)
    quantization = STRATEGIES[plan].quantization or "nf4"
    settings = {"quantization": quantization, "gradient_checkpointing": True}
    assert_extended_is_whole(config, plan, **settings)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_activations_kept(quantization):
    config = AutoConfig.for_model("llama", **SIZES)
    assert_extended_is_whole(config, "cached_reference_pass2", quantization=quantization)


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "qwen3", "phi3", "mixtral", "starcoder2"])
def test_other_families(kind):
    assert_extended_is_whole(AutoConfig.for_model(kind, **SIZES), "sft")


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_bnb_8bit", "sgd"])
def test_other_optimisers(optimizer):
    config = AutoConfig.for_model("llama", **SIZES)
    assert_extended_is_whole(config, "cached_reference_pass2", optimizer=optimizer)


def test_a_model_whose_layers_differ_is_traced_whole():
    config = AutoConfig.for_model("gemma3_text", **SIZES | {"sliding_window": 32})
    assert len(set(config.layer_types)) == 2
    trace, seen = make_tracer("sft")
    extended = layers.trace_by_layers(trace, config)
    assert seen == [10] and extended.sizes


def test_layers_that_differ_in_their_modules_alone_are_told_apart():
    qwen = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = AutoConfig.for_model("qwen3_moe", **SIZES, **qwen, decoder_sparse_step=5)
    assert not layers.has_equal_layers(config)
    alike = AutoConfig.for_model("qwen3_moe", **SIZES, **qwen, decoder_sparse_step=1)
    assert layers.has_equal_layers(alike)


def test_what_four_layers_do_not_confirm_is_not_believed(monkeypatch):
    config = AutoConfig.for_model("llama", **SIZES)
    trace, seen = make_tracer("sft")
    monkeypatch.setattr(layers, "insert_units", lambda events, units, times: events)
    assert layers.trace_by_layers(trace, config).sizes == trace(config).sizes
    assert seen == [*layers.SHALLOW, 10, 10]


def test_a_model_that_does_not_run_when_cut_is_traced_whole():
    config = AutoConfig.for_model("llama", **SIZES)
    trace, seen = make_tracer("sft")

    def trace_deep(some):
        if some.num_hidden_layers < 5:
            raise RuntimeError("too shallow")
        return trace(some)

    assert layers.trace_by_layers(trace_deep, config).sizes and seen == [10]


def test_units_are_found_at_several_places():
    fewer = [(("p", n, ""), None) for n in [*range(40), *[7, 8] * 10, *range(100, 140), 5, 5]]
    more = fewer[:60] + fewer[58:60] + fewer[60:] + fewer[-1:]
    most = fewer[:60] + 2 * fewer[58:60] + fewer[60:] + 2 * fewer[-1:]
    two, three, four = (layers.Phase("p", e, Counter()) for e in (fewer, more, most))
    assert layers.extend_phase(two, three, four, further=1) == three
    assert layers.extend_phase(two, three, four, further=2) == four
    assert layers.extend_phase(two, three, three, further=2) is None
    assert not list(layers.find_insertions(more, fewer))
