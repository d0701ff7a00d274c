"""On-policy pairs: sample the SFT policy, judge its own summaries, best against worst.

Never gold against corrupted: a policy learns little from telling apart texts it would not write.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from hallulib.detectors import Detector, NoisyJudge, Source, get_detector
from hallulib.errors import DataError, RecipeError, storage_guard
from hallulib.generation import Generation, generate_summaries, limit_new_tokens
from hallulib.models import load_policy, load_tokenizer
from hallulib.paths import write_text_atomic
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage

CHUNK_BATCHES = 4  # notes are sampled, judged and written down in chunks of this many batches


@dataclass(frozen=True)
class PairsResult:
    """What was made. `counts` tells what became of every note; errors are as the judge saw them."""

    train: int
    validation: int
    counts: dict[str, int]
    chosen_errors: float
    rejected_errors: float
    notes: dict[str, Any] = field(default_factory=dict)


def load_pairs_result(run: Run) -> PairsResult:
    """Read the result of a finished pass back from the run."""
    notes = run.manifest["stages"]["pairs"]["notes"]
    return PairsResult(**notes, notes=notes)


@stage("pairs", load=load_pairs_result)
def build_pairs(recipe: Recipe, run: Run) -> PairsResult:
    """Sample, judge and pair; writes pairs/train.parquet, validation.parquet, candidates.jsonl.

    Candidates are written down as they come, so an interrupted pass goes on where it stopped.
    Raises DataError when too few notes give a pair.
    """
    if recipe.pairs.origin != "sampled":
        raise RecipeError(
            f"pairs.origin is '{recipe.pairs.origin}', and only 'sampled' can be made so far.",
            "Set pairs.origin=sampled.",
        )
    notes = draw_notes(pd.read_parquet(run.require("data/train.parquet")), recipe)
    folder = run.checkpoint_dir("pairs", recipe)
    file = folder / "candidates.jsonl"
    with storage_guard(folder):
        folder.mkdir(parents=True, exist_ok=True)
        done = read_candidates(file)
        todo = notes[~notes["id"].isin(done)]
        if done:
            print(f"pairs: {len(done)} of {len(notes)} notes were sampled before the interruption")
        if len(todo):
            done |= _sample_notes(todo, recipe, run, file)
    return _write_pairs(notes, done, recipe, run)


def draw_notes(frame: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """Return `pairs.notes` training notes: a random choice that more notes only add to."""
    order = frame["id"].map(lambda name: sha256(f"{recipe.seed} {name}".encode()).hexdigest())
    return frame.loc[order.sort_values().index].head(recipe.pairs.notes).reset_index(drop=True)


def read_candidates(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return note id -> judged samples; a torn last line is cut off the file."""
    done: dict[str, list[dict[str, Any]]] = {}
    if not file.exists():
        return done
    good = 0
    data = file.read_bytes()
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        done[row["id"]] = row["samples"]
        good += len(line)
    if good < len(data):
        os.truncate(file, good)
    return done


def _sample_notes(
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


def _write_pairs(
    notes: pd.DataFrame, candidates: dict[str, list[dict[str, Any]]], recipe: Recipe, run: Run
) -> PairsResult:
    rows, counts, errors = [], Counter(), []
    for note in notes.to_dict("records"):
        pair = choose_pair(candidates[note["id"]])
        if isinstance(pair, str):
            counts[pair] += 1
            continue
        counts["pair"] += 1
        chosen, rejected = pair
        errors.append((chosen["errors"], rejected["errors"]))
        rows.append(
            {key: note[key] for key in ("id", "group_id", "prompt")}
            | {"chosen": chosen["text"], "rejected": rejected["text"], "origin": "sampled"}
            | {"error_types": sorted(rejected["error_types"])}
        )
    held_out = split_groups([row["group_id"] for row in rows], recipe)
    parts = {
        "train": [row for row in rows if row["group_id"] not in held_out],
        "validation": [row for row in rows if row["group_id"] in held_out],
    }
    if not parts["train"] or not parts["validation"]:
        raise DataError(
            f"{len(rows)} pairs from {len(notes)} notes are too few: {dict(counts)}.",
            "Raise pairs.notes or pairs.samples_per_note.",
        )
    for name, part in parts.items():
        _write_parquet(pd.DataFrame(part), run.path(f"pairs/{name}.parquet"))
    lines = ({"id": name, "samples": candidates[name]} for name in notes["id"])
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text_atomic(run.path("pairs/candidates.jsonl"), text)
    means = [sum(side) / len(errors) for side in zip(*errors, strict=True)]
    report = {
        "train": len(parts["train"]),
        "validation": len(parts["validation"]),
        "counts": dict(counts),
        "chosen_errors": means[0],
        "rejected_errors": means[1],
    }
    return PairsResult(**report, notes=report)


def split_groups(groups: Sequence[str], recipe: Recipe) -> set[str]:
    """Return the groups held out for validation: a share of them, at least one, never a part."""
    distinct = sorted(
        set(groups), key=lambda group: sha256(f"{recipe.seed} {group}".encode()).hexdigest()
    )
    return set(distinct[: max(1, round(len(distinct) * recipe.pairs.validation_share))])


def _write_parquet(frame: pd.DataFrame, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_guard(path):
        frame.to_parquet(temporary, index=False)
        os.replace(temporary, path)
