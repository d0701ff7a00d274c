"""Completion log-probs against full logits, and the layout of pairs."""

from __future__ import annotations

import pytest
import torch
from tiny_model import DRUGS, make_frame, make_recipe, make_texts, shared_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from hallulib import scoring
from hallulib.dpo.batching import TokenPair, collate_pairs, tokenise_pair, tokenise_pairs
from hallulib.dpo.logprobs import completion_logps, sum_completions
from hallulib.errors import DataError, HallulibError
from hallulib.models import attach_adapter, load_base_model, render_prompt

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shared_base())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(shared_base()).eval()


@pytest.fixture(scope="module")
def pairs(tokenizer):
    found = []
    for number in range(4):
        note, reference = make_texts(number)
        worse = reference.replace("Takes", "Never takes") + " Allergic to latex." * number
        found.append(tokenise_pair(tokenizer, note, reference, worse))
    return found


def naive_logps(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """One row alone, all logits, the textbook way."""
    logits = model(torch.tensor([prompt + completion])).logits[0].float()
    logps = logits.log_softmax(-1)
    start = len(prompt)
    return torch.stack([logps[start + i - 1, token] for i, token in enumerate(completion)])


@torch.no_grad()
def test_log_probs_equal_those_from_full_logits_of_each_row_alone(model, pairs):
    logps = completion_logps(model, collate_pairs(pairs, pad_id=0))
    completions = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    assert len(logps) == len(completions)
    for row, completion in enumerate(completions):
        expected = naive_logps(model, pairs[row % 4].prompt_ids, completion)
        assert torch.allclose(logps[row], expected, atol=1e-5)
    assert sum_completions(logps)[-1].item() == pytest.approx(expected.sum().item(), abs=1e-4)


def test_a_chunked_head_gives_the_same_values_and_gradients(model, pairs, monkeypatch):
    def run():
        policy = attach_adapter(load_base_model(make_recipe()), make_recipe())
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        logps = torch.cat(completion_logps(policy, collate_pairs(pairs, pad_id=0)))
        logps.sum().backward()
        grads = [p.grad for p in policy.parameters() if p.grad is not None]
        return logps.detach(), grads

    whole, whole_grads = run()
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 7 * model.config.vocab_size)
    chunked, chunked_grads = run()
    assert torch.allclose(whole, chunked, atol=1e-5)
    assert len(whole_grads) == len(chunked_grads) == 28
    for a, b in zip(whole_grads, chunked_grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_only_completion_positions_pass_through_the_head(model, pairs):
    seen = []
    handle = model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    completion_logps(model, collate_pairs(pairs, pad_id=0))
    handle.remove()
    tokens = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    assert seen == [(tokens, model.config.vocab_size)]


def test_padding_tokens_do_not_matter(model, pairs):
    first = torch.cat(completion_logps(model, collate_pairs(pairs, pad_id=0)))
    second = torch.cat(completion_logps(model, collate_pairs(pairs, pad_id=17)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chosen_only", [False, True])
def test_a_batch_scores_the_chosen_completions_first_then_the_rejected(pairs, shared, chosen_only):
    batch = collate_pairs(pairs, 0, shared, chosen_only)
    expected = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    scored = batch["targets"].split(batch["counts"].tolist())
    assert [ids.tolist() for ids in scored] == expected[: len(pairs) if chosen_only else None]


def test_prompt_and_completion_together_are_the_tokens_of_the_whole_text(tokenizer):
    note, reference = make_texts(3)
    prompt, completion = scoring.encode_completion(tokenizer, note, reference)
    whole = tokenizer(render_prompt(tokenizer, note) + reference, add_special_tokens=False)
    assert prompt + completion == [*whole.input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(completion, skip_special_tokens=True) == reference
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_a_token_that_merges_over_the_boundary_belongs_to_the_completion(tokenizer, monkeypatch):
    # Without a special token between them, the last word of the prompt and the first of the
    # completion merge: "ta" + "kes" is one token, "ta" alone another.
    monkeypatch.setattr(scoring, "render_prompt", lambda tokenizer, prompt: prompt)
    prompt, completion = scoring.encode_completion(tokenizer, "A man ta", f"kes {DRUGS[0]}.")
    alone = tokenizer("A man ta", add_special_tokens=False).input_ids
    assert len(prompt) < len(alone)
    decoded = tokenizer.decode(prompt + completion[:-1])
    assert decoded == f"A man takes {DRUGS[0]}."


def test_the_end_token_comes_once_even_if_the_text_brings_its_own(tokenizer):
    _, completion = scoring.encode_completion(tokenizer, "note", "He is well.</s>")
    assert completion.count(tokenizer.eos_token_id) == 1
    assert completion[-1] == tokenizer.eos_token_id


def test_pairs_that_are_empty_or_identical_or_too_long_are_left_out_with_the_reason(tokenizer):
    good = {"prompt": "note", "chosen": "He is well.", "rejected": "She is ill."}
    rows = [
        good,
        good | {"rejected": "  "},
        good | {"rejected": "He is well."},
        good | {"chosen": "word " * 200},
    ]
    found = tokenise_pairs(tokenizer, rows, max_length=100)
    assert len(found.pairs) == 1
    assert found.report == {
        "left out, empty completion": 1,
        "left out, identical completions": 1,
        "left out, completion longer than model.max_length": 1,
    }
    with pytest.raises(DataError, match="None of 1 pairs"):
        tokenise_pairs(tokenizer, [good], max_length=5)


@pytest.mark.parametrize(("side", "kept", "lost"), [("right", "w0", "w79"), ("left", "w79", "w0 ")])
def test_a_prompt_that_is_too_long_is_shortened_and_the_completions_are_not(
    tokenizer, side, kept, lost
):
    words = " ".join(f"w{number}" for number in range(80))
    row = {"prompt": words, "chosen": "He is well.", "rejected": "She is ill."}
    (pair,), report = tokenise_pairs(tokenizer, [row], max_length=60, side=side)
    whole = tokenise_pair(tokenizer, *row.values())
    assert 50 < pair.length <= 60 < whole.length
    assert (pair.chosen_ids, pair.rejected_ids) == (whole.chosen_ids, whole.rejected_ids)
    text = tokenizer.decode(pair.prompt_ids)
    # What the chat template puts around the words is still there.
    assert text.startswith("<s><|user|>") and text.endswith("<|assistant|>")
    assert kept in text and lost not in text
    assert report == {"with a prompt shortened to fit": 1} and pair.shortened


def test_the_address_of_a_pair_is_its_content_and_where_the_completion_starts():
    pair = TokenPair([1, 2, 3], [4, 5], [6])
    assert pair.address == TokenPair([1, 2, 3], [4, 5], [6]).address
    others = [TokenPair([1, 2], [3, 4, 5], [6]), TokenPair([1, 2, 3], [4, 5], [7])]
    others += [TokenPair([1, 2, 3], [6], [4, 5]), TokenPair([1, 2, 3], [4], [5, 6])]
    assert len({pair.address, *(other.address for other in others)}) == 5


def test_a_model_that_changes_its_logits_after_the_head_is_refused(model, pairs):
    model.config.final_logit_softcapping = 30.0
    try:
        with pytest.raises(HallulibError, match="final_logit_softcapping"):
            completion_logps(model, collate_pairs(pairs, pad_id=0))
    finally:
        del model.config.final_logit_softcapping


def test_the_prompt_column_is_what_the_template_wraps(tokenizer):
    prompt = make_frame(1, "x").prompt[0]
    assert render_prompt(tokenizer, prompt) == f"<s><|user|>{prompt}<|assistant|>"
