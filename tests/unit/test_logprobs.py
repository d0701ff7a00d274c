"""Completion log-probs against full logits, and the layout of pairs."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny_model import DRUGS, make_recipe, make_texts, shared_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from hallulib import scoring
from hallulib.dpo.batching import TokenPair, collate_pairs, load_pairs, tokenise_pair
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


@torch.no_grad()
def test_log_probs_equal_those_from_full_logits_of_each_row_alone(model, pairs):
    logps = completion_logps(model, collate_pairs(pairs, pad_id=0))
    completions = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    assert len(logps) == len(completions)
    for row, completion in enumerate(completions):
        prompt = pairs[row % 4].prompt_ids
        alone = model(torch.tensor([prompt + completion])).logits[0].float().log_softmax(-1)
        at = len(prompt) - 1
        expected = torch.stack([alone[at + i, token] for i, token in enumerate(completion)])
        assert torch.allclose(logps[row], expected, atol=1e-5)
    assert sum_completions(logps)[-1].item() == pytest.approx(expected.sum().item(), abs=1e-4)
    # Padding tokens do not matter.
    other = completion_logps(model, collate_pairs(pairs, pad_id=17))
    assert torch.equal(torch.cat(logps), torch.cat(other))


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
    with model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape)):
        completion_logps(model, collate_pairs(pairs, pad_id=0))
    tokens = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    assert seen == [(tokens, model.config.vocab_size)]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chosen_only", [False, True])
def test_a_batch_scores_the_chosen_completions_first_then_the_rejected(pairs, shared, chosen_only):
    batch = collate_pairs(pairs, 0, shared, chosen_only)
    expected = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    scored = batch["targets"].split(batch["counts"].tolist())
    assert [ids.tolist() for ids in scored] == expected[: len(pairs) if chosen_only else None]


def test_prompt_and_completion_are_the_tokens_of_the_whole_text_and_end_once(tokenizer):
    note, reference = make_texts(3)
    prompt, completion = scoring.encode_completion(tokenizer, note, reference)
    whole = tokenizer(render_prompt(tokenizer, note) + reference, add_special_tokens=False)
    assert prompt + completion == [*whole.input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(completion, skip_special_tokens=True) == reference
    assert prompt.count(tokenizer.bos_token_id) == 1
    # The end token comes once even if the text brings its own.
    _, completion = scoring.encode_completion(tokenizer, "note", "He is well.</s>")
    assert completion.index(tokenizer.eos_token_id) == len(completion) - 1


def test_a_token_that_merges_over_the_boundary_belongs_to_the_completion(tokenizer, monkeypatch):
    # Without a special token between them, the last word of the prompt and the first of the
    # completion merge: "ta" + "kes" is one token, "ta" alone another.
    monkeypatch.setattr(scoring, "render_prompt", lambda tokenizer, prompt: prompt)
    prompt, completion = scoring.encode_completion(tokenizer, "A man ta", f"kes {DRUGS[0]}.")
    alone = tokenizer("A man ta", add_special_tokens=False).input_ids
    assert len(prompt) < len(alone)
    assert tokenizer.decode(prompt + completion[:-1]) == f"A man takes {DRUGS[0]}."


def load(tmp_path, tokenizer, rows: list[dict], max_length: int, side: str = "right"):
    """The pairs and the report of a run that holds these rows."""
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    run = SimpleNamespace(require=lambda name: tmp_path / name.removeprefix("pairs/"))
    model = make_recipe({"model.max_length": max_length, "model.truncation_side": side}).model
    return load_pairs(run, "train", tokenizer, model)


def test_pairs_that_are_empty_or_identical_or_too_long_are_left_out_with_the_reason(
    tmp_path, tokenizer
):
    good = {"prompt": "note", "chosen": "He is well.", "rejected": "She is ill."}
    changes = [{}, {"rejected": "  "}, {"rejected": "He is well."}, {"chosen": "word " * 200}]
    found, report = load(tmp_path, tokenizer, [good | change for change in changes], 100)
    assert len(found) == 1
    assert report == {
        "left out, empty completion": 1,
        "left out, identical completions": 1,
        "left out, completion longer than model.max_length": 1,
    }
    with pytest.raises(DataError, match="None of 1 pairs"):
        load(tmp_path, tokenizer, [good | {"chosen": "word " * 200}], 100)


@pytest.mark.parametrize(("side", "kept", "lost"), [("right", "w0", "w79"), ("left", "w79", "w0 ")])
def test_a_prompt_that_is_too_long_is_shortened_and_the_completions_are_not(
    tmp_path, tokenizer, side, kept, lost
):
    words = " ".join(f"w{number}" for number in range(80))
    row = {"prompt": words, "chosen": "He is well.", "rejected": "She is ill."}
    (pair,), report = load(tmp_path, tokenizer, [row], 60, side)
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


def test_a_model_that_changes_its_logits_after_the_head_is_refused(model, pairs, monkeypatch):
    monkeypatch.setattr(model.config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(HallulibError, match="final_logit_softcapping"):
        completion_logps(model, collate_pairs(pairs, pad_id=0))
