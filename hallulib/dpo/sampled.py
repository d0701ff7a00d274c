"""On-policy pairs: sample the SFT policy, judge its own summaries, best against worst.

A policy learns little from telling apart texts it would not write, so both sides are its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from hallulib.detectors import Detector, NoisyJudge, Source, get_detector
from hallulib.files import recover_lines, storage_guard
from hallulib.generation import Generation, generate_summaries, limit_new_tokens
from hallulib.models import load_policy, load_tokenizer
from hallulib.recipe import Recipe
from hallulib.run import Run

CHUNK_BATCHES = 4  # notes are sampled, judged and written down in chunks of this many batches
Samples = dict[str, list[dict[str, Any]]]  # note id -> judged samples


def collect_samples(notes: pd.DataFrame, recipe: Recipe, run: Run) -> Samples:
    """Sample and judge every note; what an interrupted pass has written down is not done again."""
    folder = run.checkpoint_dir("pairs", recipe)
    file = folder / "candidates.jsonl"
    with storage_guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
        done = read_candidates(file)
        todo = notes[~notes["id"].isin(done)]
        if done:
            print(f"pairs: {len(done)} of {len(notes)} notes were sampled before the interruption")
        if len(todo):
            done |= sample_notes(todo, recipe, run, file)
    return done


def read_candidates(file: Path) -> Samples:
    """Return note id -> judged samples; a torn last line is cut off the file."""
    return {row["id"]: row["samples"] for row in recover_lines(file)}


def sample_notes(
    notes: pd.DataFrame, recipe: Recipe, run: Run, file: Path
) -> dict[str, list[dict[str, Any]]]:
    tokenizer = load_tokenizer(recipe)
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=False)
    judge = build_judge(recipe)
    train = pd.read_parquet(run.require("data/train.parquet"), columns=["reference"])
    max_new_tokens = limit_new_tokens(tokenizer, train["reference"].head(1000))
    notes = notes.loc[notes["prompt"].str.len().sort_values().index]
    size = max(1, recipe.pairs.batch_size // recipe.pairs.samples_per_note) * CHUNK_BATCHES
    found: dict[str, list[dict[str, Any]]] = {}
    bar = tqdm(total=len(notes), desc="sampling pairs", unit="note")
    for start in range(0, len(notes), size):
        chunk = notes.iloc[start : start + size]
        samples = generate_summaries(
            policy,
            tokenizer,
            chunk["prompt"].tolist(),
            batch_size=recipe.pairs.batch_size,
            max_new_tokens=max_new_tokens,
            temperature=recipe.pairs.temperature,
            num_samples=recipe.pairs.samples_per_note,
            seed=recipe.seed,
        )
        lines = ""
        for (name, context), texts in zip(
            chunk[["id", "context"]].itertuples(index=False), samples, strict=True
        ):
            found[name] = [judge_sample(judge, context, sample) for sample in texts]
            lines += json.dumps({"id": name, "samples": found[name]}, ensure_ascii=False) + "\n"
        with file.open("a", encoding="utf-8") as out:
            out.write(lines)
            out.flush()
            os.fsync(out.fileno())
        bar.update(len(chunk))
    bar.close()
    return found


def build_judge(recipe: Recipe) -> Detector:
    """Return the judge that ranks samples: rule-based, with the errors a real judge has."""
    return NoisyJudge(
        get_detector(recipe.pairs.judge),
        recipe.pairs.judge_false_positive_rate,
        recipe.pairs.judge_false_negative_rate,
        seed=recipe.seed,
    )


def judge_sample(judge: Detector, context: str, sample: Generation) -> dict[str, Any]:
    """Return a sample with what the judge, which sees the note's text only, says of it."""
    judged = judge.judge(Source(text=context), sample.text)
    return {
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "errors": judged.errors,
        "statements": len(judged.statements),
        "error_types": [s.error_type or "other" for s in judged.statements if s.is_error],
        "verdicts": [{"text": s.text, "verdict": s.verdict} for s in judged.statements],
    }


def choose_pair(
    samples: Sequence[dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]] | str:
    """Return (chosen, rejected): fewest errors against most; or why these samples make no pair.

    Among equals the one that states more is chosen, and the one that states more is rejected
    too, so that the pair is not about length. Samples that were cut off or say nothing are not
    considered.
    """
    usable = {s["text"]: s for s in samples if s["finish_reason"] == "stop" and s["statements"]}
    if len(usable) < 2:
        return "fewer than two different, complete samples"
    chosen = min(usable.values(), key=lambda s: (s["errors"], -s["statements"], s["text"]))
    rejected = max(usable.values(), key=lambda s: (s["errors"], s["statements"], s["text"]))
    if chosen["errors"] == rejected["errors"]:
        return "tie: the judge sees as many errors in every sample"
    return chosen, rejected
