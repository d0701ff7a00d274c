"""Prefix sharing: the same numbers as one row per completion, or an announced fallback."""

import re

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hallulib.dpo import logprobs
from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.logprobs import choose_layout, completion_logps

pytestmark = pytest.mark.unit

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}  # fmt: skip
SHARING = {
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 9},
    "Qwen2": GROUPED,
    "Qwen2 sliding": GROUPED
    | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "Qwen3": GROUPED | {"head_dim": 8},
    "Gemma": GROUPED | {"head_dim": 8},
    "Gemma3Text": GROUPED | {"head_dim": 8, "sliding_window": 8},
    "Phi": GROUPED,
    "Phi3": GROUPED,
    "GPTNeoX": COMMON,
    "GPT2": GPT2,
}  # fmt: skip
FALLING_BACK = {
    "Bloom": {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "GPTJ": GPT2 | {"rotary_dim": 8},
    "Mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
}


def build_model(name: str, values: dict) -> torch.nn.Module:
    config = getattr(transformers, name.split()[0] + "Config")(**values)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def make_pairs() -> list[TokenPair]:
    """Prompts longer and shorter than the sliding windows, completions of unequal lengths."""
    draw = torch.Generator().manual_seed(1)
    lengths = [(14, 6, 9), (5, 11, 3), (20, 4, 4), (1, 2, 5)]
    return [
        TokenPair(*(torch.randint(3, 97, (n,), generator=draw).tolist() for n in three))
        for three in lengths
    ]


def score(model, shared: bool, chosen_only: bool = False) -> tuple[torch.Tensor, dict]:
    """Log-probs, and the gradient of a weighted sum of them (so that no two tokens cancel)."""
    model.zero_grad()
    logps = torch.cat(completion_logps(model, collate_pairs(make_pairs(), 0, shared, chosen_only)))
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), grads


def choose(model, prefix_sharing: str = "auto"):
    return choose_layout(model, make_pairs(), 0, prefix_sharing, "float32")


def check_equal(plain: tuple, shared: tuple) -> None:
    assert torch.allclose(plain[0], shared[0], atol=1e-4)
    assert plain[1].keys() == shared[1].keys()
    largest = max(grad.norm() for grad in plain[1].values())
    for name, grad in plain[1].items():
        assert (grad - shared[1][name]).norm() <= 1e-5 * largest, name


@pytest.mark.parametrize("name", SHARING)
def test_shared_prompts_give_the_same_log_probs_and_gradients(name):
    model = build_model(name, SHARING[name])
    plain = score(model, shared=False)
    choice = choose(model)
    assert choice.shared, choice.reason
    check_equal(plain, score(model, shared=True))


@pytest.mark.parametrize("name", FALLING_BACK)
def test_a_model_that_cannot_share_falls_back_and_still_scores(name):
    model = build_model(name, FALLING_BACK[name])
    before = score(model, shared=False)[0]
    choice = choose(model)
    assert not choice.shared
    assert re.search("cannot|differ|attention is eager", choice.reason)
    assert torch.equal(before, score(model, shared=False)[0])


def test_without_its_rejected_completions_a_shared_row_is_the_same_as_plain():
    model = build_model("Llama", GROUPED)
    plain = score(model, shared=False, chosen_only=True)
    assert choose(model).shared
    check_equal(plain, score(model, shared=True, chosen_only=True))


def test_gradient_checkpointing_changes_nothing():
    model = build_model("Mistral", SHARING["Mistral"])
    assert choose(model).shared
    plain = score(model, shared=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    check_equal(plain, score(model, shared=True))


@torch.no_grad()
def test_the_plain_path_stays_and_a_completion_does_not_see_the_other_one():
    model = build_model("Llama", GROUPED)
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    seen[0, :5] = 0
    before = model(input_ids=ids, attention_mask=seen).logits
    assert choose(model).shared
    assert torch.equal(before, model(input_ids=ids, attention_mask=seen).logits)
    pair = make_pairs()[0]
    changed = TokenPair(pair.prompt_ids, [9] * len(pair.chosen_ids), pair.rejected_ids)
    rejected = [completion_logps(model, collate_pairs([p], 0, True))[1] for p in (pair, changed)]
    assert torch.equal(*rejected)


def test_a_wrong_position_is_caught_by_the_self_check_and_sharing_can_be_off(monkeypatch):
    def collate_wrongly(pairs, pad_id, shared=False, chosen_only=False):
        batch = collate_pairs(pairs, pad_id, shared, chosen_only)
        if shared:
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    monkeypatch.setattr(logprobs, "collate_pairs", collate_wrongly)
    model = build_model("Llama", GROUPED)
    choice = choose(model)
    assert not choice.shared and "the layouts differ by" in choice.reason
    assert choose(model, "off")[:2] == (False, "dpo.prefix_sharing is off")
