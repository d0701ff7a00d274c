"""The base model's card and checksums, written from its measured figures only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

CHECKSUMS = "SHA256SUMS.json"

TEXT = """# The clinic base model

A Llama-shaped causal language model of {parameters:,} parameters with its own byte-level BPE
tokenizer and chat template. It writes faithful one-paragraph summaries of the made-up clinical
notes of `hallulib.clinic`, and is the base that the course fine-tunes.

## How it was made

- Data: notes drawn by `hallulib.clinic` (seed {seed}), {examples:,} of them, each seen once; the
  target is the faithful summary. No real patient, no outside text.
- Training: {steps:,} steps of {batch_size} notes on {device}; loss on the summary only; Muon for
  the matrices, AdamW for embedding and norms, bfloat16 autocast over float32 weights.
- Curriculum: notes of a few sections first, then complete ones, half with sections missing. Half
  have numbers and doses drawn from one wide range, so that only the note can tell them.
- The last sixth is a second cycle: word vectors that had become one (cosine over 0.95) are pulled
  apart with noise, the optimisers start afresh, and the rate falls from half its peak.
- Rebuild: `make base`. Weights differ in the last digits from one processor to another.

## What it can do

Greedy summaries of {n} notes it has not seen, every section present:

{table}

## What it cannot do

- It knows nothing but this world: no real clinical text, no question, no other language.
- It has never seen the held-out style; its figures there stand in the second column.
- It is for teaching. It must not be used on patients.
"""


def write_card(folder: Path, figures: dict, parameters: int) -> None:
    """Write README.md with the table of `figures["copying"]`."""
    data = ModelCardData(language="en", license="mit", library_name="transformers")
    text = TEXT.format(
        parameters=parameters,
        seed=figures["seed"],
        steps=figures["steps"],
        batch_size=figures["batch_size"],
        examples=figures["steps"] * figures["batch_size"],
        device=figures["device"],
        n=figures["copying"]["seen_styles"]["n"],
        table=format_copying_table(figures["copying"]),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def format_copying_table(copying: dict[str, dict]) -> str:
    """Return the Markdown table per slot: share of statements right, seen and held-out style."""
    seen, held_out = copying["seen_styles"], copying["held_out_style"]
    rows = ["| slot | seen styles | held-out style |", "|---|---|---|"]
    for label, key in (("all statements", "statements_right"), ("whole summaries", "whole")):
        rows.append(f"| **{label}** | {seen[key]:.1%} | {held_out[key]:.1%} |")
    for kind, slot in seen["slots"].items():
        other = held_out["slots"].get(kind, {"right": float("nan")})
        rows.append(f"| {kind} | {slot['right']:.1%} | {other['right']:.1%} |")
    return "\n".join(rows)


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every other file of the folder."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != CHECKSUMS)
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
