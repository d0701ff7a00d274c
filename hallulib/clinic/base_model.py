"""The base model's shape, tokenizer and corpus: a small Llama that reads clinic notes.

It is pretrained to write faithful summaries: what the note states and nothing else, whatever
sections the note lacks. Everything here is a pure function of a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hallulib.clinic.notes import SECTIONS, Note, draw_patient, make_notes, write_note
from hallulib.clinic.styles import SEEN_STYLES
from hallulib.clinic.summaries import write_summary

INSTRUCTION = "Summarise the note.\n\n{context}"
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Digits stand apart from the space before them, so that a number is the same token everywhere.
WORD_PATTERN = r"\d{1,3}| ?[A-Za-z']+| ?[^\sA-Za-z\d]+|\s+"


def build_tokenizer(notes: list[Note], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a chat template on notes and their summaries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{INSTRUCTION.format(context=n.text)} {write_summary(n.facts)}" for n in notes)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the shape of the base model: a Llama of about one million parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def draw_corpus_note(rng: random.Random, progress: float) -> Note:
    """Draw one pretraining note; at `progress` 0 it has a few sections, from 0.35 on mostly all.

    The short notes come first because looking up is learnt soonest where there is little to search;
    sentences that no style of the course uses come in the second half.
    """
    names = list(SECTIONS)
    longest = round(3 + (len(names) - 3) * min(1.0, progress / 0.35))
    if progress > 0.35 and rng.random() < 0.5:
        missing: set[str] = set()
    else:
        kept = rng.randint(max(1, longest // 2), longest)
        missing = set(names) - set(rng.sample(names, kept))
    style = rng.choice([*SEEN_STYLES, "mixed"])
    if progress >= 0.5 and rng.random() < 0.5:
        style = "any"
    rate = 0.0 if progress < 0.15 else 0.2
    return write_note("corpus", style, draw_patient(rng), missing, rng, rate)


def iterate_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, start: int, steps: int, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches `start`..`steps`; batch i depends only on (seed, i).

    Each has input_ids (rows, tokens), right padded, and labels, -100 outside the summary.
    """
    for step in range(start, steps):
        rng = random.Random(f"pretrain-{seed}-{step}")
        notes = [draw_corpus_note(rng, step / steps) for _ in range(batch_size)]
        yield collate([encode_note(tokenizer, note) for note in notes], tokenizer.pad_token_id)


def encode_note(tokenizer: PreTrainedTokenizerFast, note: Note) -> tuple[list[int], list[int]]:
    """Return the token ids of the rendered prompt and of the faithful summary with its EOS."""
    message = {"role": "user", "content": INSTRUCTION.format(context=note.text)}
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    summary = write_summary(note.facts) + tokenizer.eos_token
    return (
        tokenizer(prompt, add_special_tokens=False).input_ids,
        tokenizer(summary, add_special_tokens=False).input_ids,
    )


def collate(rows: list[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad (prompt, summary) rows on the right."""
    width = max(len(prompt) + len(summary) for prompt, summary in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, summary) in enumerate(rows):
        ids = torch.tensor(prompt + summary)
        input_ids[i, : len(ids)] = ids
        labels[i, len(prompt) : len(ids)] = ids[len(prompt) :]
    return {"input_ids": input_ids, "labels": labels}


def tokenizer_corpus(seed: int) -> list[Note]:
    """Return the notes the tokenizer is trained on (seen styles only)."""
    return make_notes(6000, seed, SEEN_STYLES, missing_rate=0.1, prefix="tokenizer")
