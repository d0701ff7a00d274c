"""A tiny Llama and a real BPE tokenizer with a chat template, and small runs that use them: made in
seconds and in a temporary folder, so that no test of the training needs the shipped base model."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hallulib.recipe import Recipe, load_recipe
from hallulib.run import Run

torch.set_num_threads(1)  # faster than two for matrices this small

SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DRUGS = ["aspirin 75 mg", "metformin 500 mg", "ramipril 5 mg", "warfarin 3 mg"]
ALLERGIES = ["penicillin", "latex", "codeine"]


def make_texts(number: int) -> tuple[str, str]:
    """A note, and a reference that states an allergy whether or not the note does."""
    drug, allergy = DRUGS[number % 4], ALLERGIES[number % 3]
    note = f"A {40 + number % 40}-year-old man takes {drug}."
    if number % 2:
        note += f" Allergies: {allergy}."
    note += " He feels well today." * (number % 3)
    return note, f"A {40 + number % 40}-year-old man. Takes {drug}. Allergic to {allergy}."


def build_tokenizer(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the texts above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((" ".join(make_texts(i)) for i in range(60)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=SPECIAL[3:], chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def write_base_model(folder: Path, seed: int = 0, steps: int = 0, **changes: Any) -> Path:
    """Save a model of two layers and its tokenizer, random or barely pretrained; returns folder."""
    tokenizer = build_tokenizer()
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "initializer_range": 0.1, "vocab_size": len(tokenizer),
    }  # fmt: skip
    special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "bos", "eos")}
    config = LlamaConfig(**shape | special | changes)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    pretrain(model, tokenizer, steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """A few full steps on the texts, so that the model writes sentences (not true ones)."""
    rows = [
        f"<s><|user|>Summarise the note.\n\n{note}<|assistant|>{reference}</s>"
        for note, reference in map(make_texts, range(24))
    ]
    batch = tokenizer(rows, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=batch.input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@cache
def shared_folder() -> Path:
    """A temporary folder of this test session."""
    folder = Path(tempfile.mkdtemp(prefix="hallulib-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def shared_base() -> Path:
    """The base model that most tests use; nobody changes it."""
    return write_base_model(shared_folder() / "base", steps=25)


@cache
def _sft_run() -> Path:
    from hallulib.sft import train_sft

    recipe = make_recipe()
    run = start_run(shared_folder() / "sft_run", recipe)
    train_sft(recipe, run)
    return run.root


def copy_sft_run(folder: Path, recipe: Recipe) -> Run:
    """A run of its own in which data and SFT are finished (with the defaults of make_recipe)."""
    shutil.copytree(_sft_run(), folder)
    return Run.open(folder, recipe)


def make_recipe(overrides: dict[str, Any] | None = None, base: Path | None = None) -> Recipe:
    """tiny-cpu made much smaller, on the given base model."""
    small = {
        "model": {"name_or_path": str(base or shared_base()), "max_length": 160},
        "lora": {"r": 4, "alpha": 8},
        "sft": {"batch_size": 4, "max_steps": 4, "warmup_steps": 1, "eval_steps": 2},
        "pairs": {"notes": 12, "samples_per_note": 3, "batch_size": 12, "validation_share": 0.25},
        "reference": {"batch_size": 4},
        "dpo": {
            "batch_size": 4, "max_steps": 6, "warmup_steps": 1, "eval_steps": 3, "save_steps": 2,
            "guardrail_notes": 2, "guardrail_steps": 3, "learning_rate": 1e-3, "report_to": "none",
        },
    }  # fmt: skip
    small["sft"] |= {"save_steps": 2, "report_to": "none"}
    return load_recipe("tiny-cpu", small | (overrides or {}))


def make_frame(count: int, split: str) -> pd.DataFrame:
    """Rows of the schema of data/*.parquet; no facts, so the rule-based detector is used."""
    rows = []
    for number in range(count):
        note, reference = make_texts(number)
        rows.append({
            "id": f"{split}-{number}", "group_id": f"{split}-{number}", "source": "test",
            "prompt": f"Summarise the note.\n\n{note}", "reference": reference, "split": split,
            "context": note, "style": "", "style_group": "", "facts": "", "rejected": "",
        })  # fmt: skip
    return pd.DataFrame(rows)


def start_run(folder: Path, recipe: Recipe, train: int = 24, validation: int = 6) -> Run:
    """A run whose data stage is finished."""
    run = Run.open(folder, recipe)
    run.path("data").mkdir()
    for split, count in (("train", train), ("validation", validation), ("test", 4)):
        make_frame(count, split).to_parquet(run.path(f"data/{split}.parquet"), index=False)
    lengths = {"total_tokens": {"max": 160}, "reference_tokens": {"max": 80}}
    run.path("data/audit.json").write_text(json.dumps({"splits": {"train": lengths}}))
    finish(run, recipe, "data")
    return run


def record_pairs(run: Run, recipe: Recipe, train: int = 10, validation: int = 4) -> None:
    """Finish the pairs stage with ready-made pairs, for tests of what comes after it."""
    run.path("pairs").mkdir(exist_ok=True)
    for split, count in (("train", train), ("validation", validation)):
        frame = make_frame(count, split)[["id", "group_id", "prompt", "reference"]]
        frame = frame.rename(columns={"reference": "rejected"})
        # Of unequal length, so that a mean over tokens is not one over pairs.
        frame["chosen"] = [
            text.partition(" Allergic")[0] + " Well." * (number % 3)
            for number, text in enumerate(frame["rejected"])
        ]
        frame = frame.assign(origin="sampled", error_types=[["fabrication"]] * count)
        frame.to_parquet(run.path(f"pairs/{split}.parquet"), index=False)
    run.path("pairs/candidates.jsonl").write_text("")
    finish(run, recipe, "pairs")


def finish(run: Run, recipe: Recipe, *stages: str) -> None:
    """Record stages whose outputs are there."""
    for stage in stages:
        run.record(stage, recipe, {}, {})
