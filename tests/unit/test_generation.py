"""Generation in one shared row per prompt against the textbook ways of doing it."""

import pytest
import torch
from tiny_model import make_texts, shared_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from hallulib.errors import RecipeError
from hallulib.generation import choose_tokens, draw_numbers, generate_summaries, limit_new_tokens
from hallulib.models import render_prompt

pytestmark = pytest.mark.unit

PROMPTS = [f"Summarise the note.\n\n{make_texts(number)[0]}" for number in (5, 0, 7, 2, 4, 11)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shared_base())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(shared_base()).eval()


def generate(model, tokenizer, prompts=PROMPTS, **options):
    defaults = {"batch_size": 64, "max_new_tokens": 40}
    return generate_summaries(model, tokenizer, prompts, **defaults | options)


def encode(tokenizer, prompt: str) -> torch.Tensor:
    text = render_prompt(tokenizer, prompt)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def test_greedy_summaries_equal_those_of_transformers_one_prompt_at_a_time(model, tokenizer):
    generated = generate(model, tokenizer)
    ends = set()
    for prompt, (sample,) in zip(PROMPTS, generated, strict=True):
        ids = encode(tokenizer, prompt)
        expected = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        expected = [token for token in expected.tolist() if token != tokenizer.eos_token_id]
        assert sample.token_ids == expected
        assert sample.text == tokenizer.decode(expected, skip_special_tokens=True).strip()
        ends.add(len(expected))
    assert len(ends) > 1, "rows must end at different steps, or dropping them is not tested"


@torch.no_grad()
def test_samples_in_a_shared_row_equal_samples_drawn_one_by_one_without_a_cache(model, tokenizer):
    temperature, steps = 1.3, 15
    generated = generate(
        model, tokenizer, num_samples=3, temperature=temperature, seed=4, max_new_tokens=steps
    )
    for prompt, samples in zip(PROMPTS, generated, strict=True):
        draws = draw_numbers(4, prompt, 3, steps)
        for sample, draw in zip(samples, draws, strict=True):
            ids = encode(tokenizer, prompt)
            tokens = []
            for number in draw:
                probabilities = (model(ids).logits[0, -1] / temperature).softmax(-1)
                token = int((probabilities.cumsum(-1) <= number).sum())
                if token == tokenizer.eos_token_id:
                    break
                tokens.append(token)
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            assert sample.token_ids == tokens


def test_a_pass_done_in_pieces_gives_what_it_gives_in_one(model, tokenizer):
    options = {"num_samples": 2, "temperature": 1.0, "seed": 1}
    whole = generate(model, tokenizer, **options)
    pieces = generate(model, tokenizer, PROMPTS[3:], batch_size=2, **options)
    assert [[s.text for s in samples] for samples in whole[3:]] == [
        [s.text for s in samples] for samples in pieces
    ]
    other = generate(model, tokenizer, **options | {"seed": 2})
    assert [s.text for row in whole for s in row] != [s.text for row in other for s in row]


def test_samples_follow_the_probabilities_of_the_model():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 1, 3)
    draws = torch.linspace(0.0005, 0.9995, 1000)
    chosen = [choose_tokens(logits, 1.0, draw.view(1, 1)).item() for draw in draws]
    assert [chosen.count(token) for token in range(3)] == [500, 300, 200]


def test_a_summary_that_is_cut_off_says_so_and_no_prompts_give_none(model, tokenizer):
    assert generate(model, tokenizer, []) == []
    for (cut,), (whole,) in zip(
        generate(model, tokenizer, max_new_tokens=3), generate(model, tokenizer), strict=True
    ):
        assert cut.finish_reason == "length"
        assert cut.token_ids == whole.token_ids[:3]
        assert whole.finish_reason == "stop"


def watch_shapes(module) -> tuple[list[tuple[int, int]], object]:
    """(rows, tokens) that the module puts out at each call, and the handle that ends it."""
    shapes = []

    def note(module, args, out):
        out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
        shapes.append(tuple(out.shape[:2]))

    return shapes, module.register_forward_hook(note)


def test_finished_rows_leave_the_batch(model, tokenizer):
    shapes, handle = watch_shapes(model.model)
    with handle:
        generate(model, tokenizer)
    assert shapes[0][0] == len(PROMPTS) > shapes[-1][0]
    assert len(shapes) <= 40


def test_a_prompt_is_read_once_and_no_more_logits_are_made_than_tokens_are_chosen(model, tokenizer):
    (read, reading), (made, making) = watch_shapes(model.model), watch_shapes(model.lm_head)
    with reading, making:
        generate(model, tokenizer, PROMPTS[:2], num_samples=4, temperature=1.0, max_new_tokens=3)
    width = max(encode(tokenizer, prompt).shape[1] for prompt in PROMPTS[:2])
    assert read == [(2, width), (2, 4), (2, 4)] and made == [(2, 1), (2, 4), (2, 4)]


def test_several_samples_without_a_temperature_are_refused(model, tokenizer):
    with pytest.raises(RecipeError, match="temperature 0"):
        generate(model, tokenizer, num_samples=2)


def test_the_limit_leaves_room_beyond_the_longest_reference(tokenizer):
    texts = ["Well.", "A 40-year-old man takes aspirin 75 mg and feels well today."]
    longest = len(tokenizer(texts[1], add_special_tokens=False).input_ids)
    assert limit_new_tokens(tokenizer, texts) == longest + longest // 4 + 1


def test_the_model_is_left_in_evaluation_mode_and_without_gradients(model, tokenizer):
    model.train()
    generate(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert not model.training
