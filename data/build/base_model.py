"""The base model's shape, tokenizer and corpus: a small Llama that reads clinic notes.

It is pretrained to write faithful summaries: what the note states and nothing else, whatever
sections the note lacks. Everything here is a pure function of a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hallulib.clinic import SEEN_STYLES, Note, make_notes, write_summary
from hallulib.clinic.notes import (
    SECTIONS,
    WORDS,
    WRITERS,
    Facts,
    Writer,
    draw_patient,
    write_note,
)

INSTRUCTION = "Summarise the note.\n\n{context}"
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A number takes the space before it along, as a word does, so that what it is the number of stands
# one token before it.
WORD_PATTERN = r" ?\d{1,3}| ?[A-Za-z']+| ?[^\sA-Za-z\d]+|\s+"


def make_corpus_writers() -> dict[str, Writer]:
    """The writers of seen styles, and two for pretraining only: "mixed" borrows from all of them,
    "any" also from wordings.yaml."""
    seen = {style: WRITERS[style] for style in SEEN_STYLES}
    misleading = seen[SEEN_STYLES[0]].misleading
    mixed = {
        section: [sentence for writer in seen.values() for sentence in writer.sentences[section]]
        for section in SECTIONS
    }
    more = yaml.safe_load((Path(__file__).parent / "wordings.yaml").read_text("utf-8"))
    whatever = {name: mixed[name] + more["wordings"][name] for name in mixed}
    mislead = {topic: misleading[topic] + more["misleading"][topic] for topic in misleading}
    return seen | {
        "mixed": Writer("mixed", mixed, misleading), "any": Writer("any", whatever, mislead),
    }  # fmt: skip


CORPUS_WRITERS = make_corpus_writers()


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
    sentences that no style of the course uses come later. Half the notes have implausible values.
    """
    longest = round(3 + (len(SECTIONS) - 3) * min(1.0, progress / 0.35))
    if progress > 0.35 and rng.random() < 0.5:
        missing: set[str] = set()
    else:
        kept = rng.randint(max(1, longest // 2), longest)
        missing = set(SECTIONS) - set(_draw_sections(rng, kept))
    style = rng.choice([*SEEN_STYLES, "mixed"])
    if progress >= 0.35 and rng.random() < 0.5:
        style = "any"
    patient = draw_patient(rng)
    if rng.random() < 0.5:
        patient |= draw_implausible_values(rng)
    rate = 0.0 if progress < 0.15 else rng.choice([0.15, 0.4])
    writer = replace(CORPUS_WRITERS[style], distractor_rate=rate)
    return write_note("corpus", writer, patient, missing, rng)


def _draw_sections(rng: random.Random, count: int) -> list[str]:
    """Draw sections without replacement; those with numbers, the hardest, three times as likely."""
    weights = {name: 3 if name in ("vitals", "medications", "lab") else 1 for name in SECTIONS}
    return sorted(SECTIONS, key=lambda name: rng.random() ** (1 / weights[name]))[-count:]


def draw_implausible_values(rng: random.Random) -> Facts:
    """Return numbers and doses that nobody could guess from what they are numbers of.

    From plausible notes alone the model learns that 80 is a pulse, 150 a pressure and 500 mg a dose
    of metformin, and is wrong where the ranges meet; these can be had from the note only.
    """
    age, pulse, systolic = (str(rng.randint(18, 188)) for _ in range(3))
    known, labs = WORDS["drugs"], WORDS["labs"]
    doses = sorted({dose for drug in known.values() for dose in drug["doses"]})
    times = sorted({time for drug in known.values() for time in drug["times"]})
    drugs = rng.sample(sorted(known), rng.choice([1, 2, 2]))
    names, units = sorted(labs), [lab["unit"] for lab in labs.values()]
    amount = f"{rng.uniform(1, 20):.1f}" if rng.random() < 0.5 else str(rng.randint(2, 160))
    return {
        "age": [age],
        "heart_rate": [pulse],
        "blood_pressure": [f"{systolic}/{rng.randint(50, 112)}"],
        "medications": [f"{drug} {rng.choice(doses)} {rng.choice(times)}" for drug in drugs],
        "lab": [f"{rng.choice(names)} {amount} {rng.choice(units)}"],
    }


def iterate_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, steps: range, curriculum: int, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches of `steps`; batch i depends only on (seed, i, curriculum).

    `curriculum` is the number of steps over which notes become harder. A batch has input_ids
    (rows, tokens), right padded, and labels, -100 outside the summary.
    """
    for step in steps:
        rng = random.Random(f"pretrain-{seed}-{step}")
        notes = [draw_corpus_note(rng, min(1.0, step / curriculum)) for _ in range(batch_size)]
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
