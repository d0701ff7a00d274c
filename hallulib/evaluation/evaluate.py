"""The evaluation stage: every system on the same held-out items, judged independently."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hallulib.data.schema import read_rows, read_source
from hallulib.detectors import Detector, get_detector
from hallulib.errors import DataError, RecipeError
from hallulib.evaluation.card import write_model_card
from hallulib.evaluation.metrics import build_summary, group_by_system, make_record
from hallulib.evaluation.page import write_pages
from hallulib.evaluation.texts import measure_texts
from hallulib.generation import generate_summaries
from hallulib.models import load_systems, load_tokenizer, pick_device, use_system
from hallulib.paths import write_json_atomic, write_text_atomic
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.scoring import encode_completion, pad_rows, score_completions
from hallulib.stage import stage

CHUNK_BATCHES = 2  # batches generated between two writes to disk
SCORED = 100  # items whose references are scored: perplexity needs no more, and reads everything


@dataclass(frozen=True)
class EvaluationResult:
    """What the evaluation stage wrote: the summary, and the verdicts it rests on."""

    summary: dict[str, Any]
    folder: Path
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def systems(self) -> dict[str, dict[str, Any]]:
        """system -> its figures."""
        return self.summary["systems"]

    def read_records(self) -> list[dict[str, Any]]:
        """The rows of evaluation.jsonl: one per item and system, with every verdict."""
        return list(read_jsonl(self.folder / "evaluation.jsonl"))

    def read_generations(self) -> list[dict[str, Any]]:
        """The rows of generations.jsonl: one per item and system, with the generated text."""
        return list(read_jsonl(self.folder / "generations.jsonl"))


def load_evaluation_result(run: Run) -> EvaluationResult:
    """Read the result of a finished evaluation. Raises MissingArtifact if there is none."""
    path = run.require("evaluation/summary.json")
    return EvaluationResult(json.loads(path.read_text("utf-8")), path.parent)


@stage("evaluation", load=load_evaluation_result)
def evaluate_systems(recipe: Recipe, run: Run) -> EvaluationResult:
    """Generate greedily with base, SFT, DPO and the arms on the same test items, judge, and report.

    Writes evaluation/{generations,evaluation}.jsonl, summary.json, report.{html,md} and
    model_card.md. One model is loaded; systems are adapters on it. An interrupted call continues
    with the rows it lacks. Raises RecipeError when the detector is the one that made the pairs.
    """
    check_independent_detector(recipe)
    rows = choose_items(read_rows(run.require("data/test.parquet")), recipe.evaluation.notes)
    detector = build_detector(recipe)
    detector.judge(read_source(rows[0]), "")  # one that cannot judge this says so before hours
    generations = generate_all(recipe, run, rows)
    records = judge_all(detector, rows, generations)
    summary = build_summary(records, recipe.seed) | {"recipe": recipe.name, "seed": recipe.seed}
    written = group_by_system(generations)
    summary["texts"] = {name: measure_texts(own, recipe.seed) for name, own in written.items()}
    summary["independent_detector"] = recipe.pairs.judge != recipe.evaluation.detector
    folder = run.path("evaluation")
    write_jsonl(folder / "generations.jsonl", generations)
    write_jsonl(folder / "evaluation.jsonl", records)
    write_json_atomic(folder / "summary.json", summary)
    write_pages(folder, summary, records, generations)
    write_model_card(folder / "model_card.md", recipe, run, summary)
    notes = {"n": summary["n"], "detector": summary["detector"]}
    return EvaluationResult(summary, folder, notes)


def check_independent_detector(recipe: Recipe) -> None:
    """Refuse to report with the detector that made the pairs.

    DPO learns what that detector does not see, so its figures flatter most where it matters.
    Raises RecipeError.
    """
    is_same = recipe.pairs.judge == recipe.evaluation.detector
    if is_same and not recipe.evaluation.force_same_detector:
        raise RecipeError(
            f"evaluation.detector is {recipe.evaluation.detector!r}, which also judged the pairs: "
            "training on a detector and reporting with it overstates the effect",
            "set evaluation.detector to another one (facts, for the clinic world), or "
            "evaluation.force_same_detector=true if there is none: the report will say so",
        )


def choose_items(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """The first `count` items (0 = all), taken in turn from each style group, so that a small
    evaluation still has both."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["style_group"], []).append(row)
    turns = zip_longest(*groups.values())
    return [row for turn in turns for row in turn if row is not None][: count or None]


def find_systems(recipe: Recipe, run: Run) -> dict[str, Path]:
    """name -> adapter folder of every trained system; "base" is the model without one."""
    paths = {"sft": run.require("sft/adapter"), "dpo": run.require("dpo/adapter")}
    for arm in recipe.dpo.comparison_arms:
        paths[arm] = run.require("dpo/arms") / arm / "adapter"
    return paths


def generate_all(
    recipe: Recipe, run: Run, rows: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Rows of generations.jsonl for all systems, reusing what an interrupted call has written.

    The work files lie in the checkpoint folder, whose name holds the stage key: rows made with
    another adapter, recipe or code are in another folder and are never mixed in.
    """
    rows = [row | {"scored": place < SCORED} for place, row in enumerate(rows)]
    adapters = find_systems(recipe, run)
    folder = run.checkpoint_dir("evaluation", recipe)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in ("base", *adapters)}
    missing = {name: find_missing(path, rows) for name, path in files.items()}
    if any(missing.values()):
        model, tokenizer = load_systems(recipe, adapters), load_tokenizer(recipe)
        for name, todo in missing.items():
            with use_system(model, name):
                generate_missing(model, tokenizer, todo, files[name], name, recipe)
    order = {row["id"]: place for place, row in enumerate(rows)}
    generations = [row for path in files.values() for row in read_jsonl(path) if row["id"] in order]
    names = list(files)
    return sorted(generations, key=lambda g: (names.index(g["system"]), order[g["id"]]))


def find_missing(path: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The items without a line in `path`; a torn last line (a killed process) is cut off first."""
    if not path.exists():
        return rows
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text_atomic(path, whole)
    done = {row["id"] for row in read_jsonl(path)}
    return [row for row in rows if row["id"] not in done]


def generate_missing(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], path: Path, system: str, recipe: Recipe
) -> None:
    """Generate for `rows` and append each chunk to `path`, flushed to disk, as it is finished."""
    settings = recipe.evaluation
    size = settings.batch_size * CHUNK_BATCHES
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(rows), desc=system) as bar:
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            outputs = generate_summaries(
                model, tokenizer, [row["prompt"] for row in chunk],
                batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens,
            )  # fmt: skip
            scores = score_references(model, tokenizer, chunk, recipe)
            for row, (output,), score in zip(chunk, outputs, scores, strict=True):
                generation = _make_generation(row, output, system) | score
                file.write(json.dumps(generation, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(chunk))


@torch.no_grad()
def score_references(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], recipe: Recipe
) -> list[dict[str, Any]]:
    """How likely each reference is under the system: {reference_logp (nats), reference_hits (tokens
    that were the most likely), reference_tokens}; all None beyond the first SCORED items, for an
    empty reference, and for a row longer than model.max_length: cut, it would be another text."""
    names = ("reference_logp", "reference_hits", "reference_tokens")
    scores: list[dict[str, Any]] = [dict.fromkeys(names) for _ in rows]
    coded = [encode_completion(tokenizer, row["prompt"], row["reference"]) for row in rows]
    fits = []
    for place, (row, pair) in enumerate(zip(rows, coded, strict=True)):
        short = sum(map(len, pair)) <= recipe.model.max_length
        if row["scored"] and row["reference"].strip() and short:
            fits.append(place)
    for start in range(0, len(fits), recipe.evaluation.batch_size):
        batch = fits[start : start + recipe.evaluation.batch_size]
        ids, mask = (t.to(model.device) for t in pad_rows([coded[i] for i in batch], 0))
        found = score_completions(model, ids, mask)
        sizes = [len(coded[i][1]) for i in batch]
        parts = zip(*(flat.split(sizes) for flat in found), strict=True)
        for i, size, (logps, hits) in zip(batch, sizes, parts, strict=True):
            values = (round(float(logps.double().sum()), 4), int(hits.sum()), size)
            scores[i] = dict(zip(names, values, strict=True))
    return scores


def _make_generation(row: dict[str, str], output: Any, system: str) -> dict[str, Any]:
    kept = ("id", "group_id", "style", "style_group", "prompt", "context", "reference")
    return {name: row[name] for name in kept} | {
        "system": system, "text": output.text, "finish_reason": output.finish_reason,
        "n_tokens": len(output.token_ids),
    }  # fmt: skip


def build_detector(recipe: Recipe) -> Detector:
    """The detector that reports. An entailment model goes where the language model goes."""
    if recipe.evaluation.detector != "nli":
        return get_detector(recipe.evaluation.detector)
    device = pick_device(recipe)
    return get_detector("nli", name_or_path=recipe.evaluation.nli_model, device=device)


def judge_all(
    detector: Detector, rows: list[dict[str, str]], generations: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of evaluation.jsonl, in the order of the generations."""
    sources = {row["id"]: read_source(row) for row in rows}
    return [
        make_record(g, detector.judge(sources[g["id"]], g["text"]))
        for g in tqdm(generations, desc=detector.name, unit="summary")
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON Lines file. Raises DataError naming the line that is not JSON."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path.name}, line {number}: not JSON ({error.msg})",
                    "run notebook 06_evaluation again",
                ) from error
