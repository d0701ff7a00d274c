"""What the arms of dpo_vs_trl.py work on: a model folder and a file of pairs, equal for all."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hallulib.clinic.notes import make_notes
from hallulib.clinic.summaries import write_summary
from hallulib.dpo.batching import TokenPair
from hallulib.files import project_root
from hallulib.training import draw_order

BASE = project_root() / "data" / "base_model"
WORKLOADS = (1, 4, 9)  # prompt tokens per completion token
PAIRS_PER_STEP, COMPLETION_TOKENS = 4, 100
PAIRS_FILE, UNORDERED_FILE, MODEL_FOLDER = "pairs.jsonl", "unordered.jsonl", "model"


@dataclass(frozen=True)
class BenchmarkModel:
    title: str
    width: int = 0  # 0: the shipped base model


MODELS = {
    "clinic": BenchmarkModel("clinic base model"),
    "wide": BenchmarkModel("Llama shape, 256 wide, 6 layers, 8192 words", width=256),
}


def write_workload(model: str, ratio: int, steps: int, folder: Path) -> dict[str, float]:
    """Write the model and the pairs of one workload; return mean tokens of prompt and completion.

    Our trainer draws an order of its own. So they are written twice: as drawn, for us, and in the
    order in which our trainer takes them, for TRL, which then sees the same batches.
    """
    if MODELS[model].width:
        write_wide_model(folder / MODEL_FOLDER, MODELS[model].width)
        make_pair = draw_word_pair
    else:
        (folder / MODEL_FOLDER).symlink_to(BASE, target_is_directory=True)
        make_pair = draw_clinic_pair
    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL_FOLDER)
    rng = random.Random(f"{model}-{ratio}")
    rows = [make_pair(rng, ratio) for _ in range(steps * PAIRS_PER_STEP)]
    pairs = [tokenise(tokenizer, row) for row in rows]
    order = draw_order([pair.length for pair in pairs], PAIRS_PER_STEP, steps, seed=0)
    for name, numbers in ((UNORDERED_FILE, range(len(rows))), (PAIRS_FILE, order)):
        text = "".join(json.dumps(rows[i]) + "\n" for i in numbers)
        (folder / name).write_text(text, "utf-8")
    count = 2 * len(pairs)
    completion = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs) / count
    prompt = sum(len(p.prompt_ids) for p in pairs) / len(pairs)
    return {"prompt_tokens": round(prompt, 1), "completion_tokens": round(completion, 1)}


def tokenise(tokenizer: PreTrainedTokenizerFast, row: dict[str, str]) -> TokenPair:
    """Token ids as TRL makes them of plain text: no template, one end token per completion."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
    sides = []
    for side in ("chosen", "rejected"):
        whole = tokenizer(row["prompt"] + row[side], add_special_tokens=False).input_ids
        assert whole[: len(prompt)] == prompt
        sides.append([*whole[len(prompt) :], tokenizer.eos_token_id])
    return TokenPair(prompt, *sides)


def draw_clinic_pair(rng: random.Random, ratio: int) -> dict[str, str]:
    """Notes one after another until the prompt is long enough; two summaries."""
    chosen, rejected, *more = make_notes(2 + 2 * ratio, seed=rng.randrange(10**9))
    words = " ".join(note.text.replace("\n", " ") for note in more).split(" ")
    prompt = " ".join(words[: round(0.76 * ratio * COMPLETION_TOKENS)])
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt} | {k: " " + write_summary(note.facts) for k, note in sides.items()}


def draw_word_pair(rng: random.Random, ratio: int) -> dict[str, str]:
    """Words of a fixed vocabulary, one token each; lengths vary by a tenth."""

    def words(count: int) -> str:
        count = round(count * rng.uniform(0.9, 1.1))
        return " ".join(f"w{rng.randrange(8000)}" for _ in range(count))

    return {
        "prompt": words(ratio * COMPLETION_TOKENS),
        "chosen": " " + words(COMPLETION_TOKENS),
        "rejected": " " + words(COMPLETION_TOKENS),
    }


def write_wide_model(folder: Path, width: int) -> None:
    """A random Llama whose vocabulary is 32 times its width, as Llama-3-8B's is 31 times."""
    names = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(32 * width - 4)]
    backend = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(wide_config(width)).save_pretrained(folder)


def wide_config(width: int) -> LlamaConfig:
    """The shape of :func:`write_wide_model`."""
    return LlamaConfig(
        vocab_size=32 * width, hidden_size=width, intermediate_size=704, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def count_weights(model: str) -> tuple[int, int]:
    """Return how many weights a token meets in the layers, and how many in the head."""
    width = MODELS[model].width
    config = wide_config(width) if width else AutoConfig.from_pretrained(BASE)
    with torch.device("meta"):
        built = LlamaForCausalLM(config)
    linear = [m for m in built.model.modules() if isinstance(m, torch.nn.Linear)]
    return sum(m.weight.numel() for m in linear), built.lm_head.weight.numel()
