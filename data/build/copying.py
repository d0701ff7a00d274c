"""What the base model can do: how often each slot of a note is copied right."""

from __future__ import annotations

import torch
from base_model import INSTRUCTION
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hallulib.clinic import (
    HELD_OUT_STYLE,
    KINDS,
    SEEN_STYLES,
    Note,
    check,
    find_omissions,
    make_notes,
)


def measure_copying(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int = 500, seed: int = 20
) -> dict[str, dict]:
    """Measure greedy summaries of complete, unseen notes: one table for the seen styles, one for
    the held-out style (:func:`tabulate_copying`)."""
    groups = {"seen_styles": SEEN_STYLES, "held_out_style": [HELD_OUT_STYLE]}
    tables = {}
    for name, styles in groups.items():
        notes = make_notes(count, seed, styles, missing_rate=0.0, prefix=f"copying-{name}")
        tables[name] = tabulate_copying(notes, summarise(model, tokenizer, notes))
    return tables


def tabulate_copying(notes: list[Note], summaries: list[str]) -> dict:
    """Return n, the share of right statements, of summaries right as a whole (no wrong statement,
    nothing omitted), and per kind of fact the share right and the number stated."""
    right = {kind: 0 for kind in (*KINDS, "unparsed")}
    stated, whole = dict(right), 0
    for note, summary in zip(notes, summaries, strict=True):
        verdicts = check(note.facts, summary)
        for verdict in verdicts:
            stated[verdict["kind"]] += 1
            right[verdict["kind"]] += verdict["verdict"] == "supported"
        is_right = all(verdict["verdict"] == "supported" for verdict in verdicts)
        whole += is_right and not find_omissions(note.facts, summary)
    slots = {k: {"right": right[k] / n, "stated": n} for k, n in stated.items() if n}
    share = sum(right.values()) / max(1, sum(stated.values()))
    return {"n": len(notes), "statements_right": share, "whole": whole / len(notes), "slots": slots}


@torch.no_grad()
def summarise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    notes: list[Note],
    batch_size: int = 50,
) -> list[str]:
    """Return one greedy summary per note."""
    summaries = []
    for start in range(0, len(notes), batch_size):
        messages = [
            [{"role": "user", "content": INSTRUCTION.format(context=note.text)}]
            for note in notes[start : start + batch_size]
        ]
        prompts = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left",
            add_special_tokens=False, return_token_type_ids=False,
        ).to(model.device)  # fmt: skip
        outputs = model.generate(**inputs, max_new_tokens=192, do_sample=False)
        new_tokens = outputs[:, inputs["input_ids"].shape[1] :]
        summaries += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return summaries
