"""A real entailment checkpoint of a few thousand weights: it learns that a word entails itself.

"fever cough" entails "fever"; "no fever" contradicts it; what is not there is neutral.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = "fever cough rash asthma stroke aspirin".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
ORDER = ["neutral", "entailment", "contradiction"]  # on purpose not the usual order


def build_tokenizer(longest: int) -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, "no", ".", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names)


def make_pair(rng: random.Random) -> tuple[str, str, int]:
    denied = {word for word in WORDS if rng.random() < 0.35}
    words = rng.sample(WORDS, k=rng.randint(1, 3))
    asked = rng.choice(words) if rng.random() < 0.6 else rng.choice(WORDS)
    note = [f"no {word}" if word in denied else word for word in words]
    label = 0 if asked not in words else 2 if asked in denied else 1
    return " . ".join(note), asked, label


def write_nli_model(folder: Path, steps: int = 450, longest: int = 10, seed: int = 0) -> Path:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(longest)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=longest + 2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.1, id2label=dict(enumerate(ORDER)),
        label2id={name: place for place, name in enumerate(ORDER)},
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        notes, asked, labels = zip(*(make_pair(rng) for _ in range(64)), strict=True)
        batch = tokenizer(list(notes), list(asked), padding=True, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
