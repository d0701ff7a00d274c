"""The evaluation stage: every system on the same held-out items, judged independently."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hallulib.data.schema import read_rows, read_source
from hallulib.detectors import Detector, Judgement, Source, get_detector
from hallulib.errors import DataError, RecipeError
from hallulib.evaluation.metrics import build_summary, make_record
from hallulib.evaluation.outputs import Row, generate_all
from hallulib.evaluation.pages import write_model_card, write_report
from hallulib.evaluation.texts import measure_texts
from hallulib.files import append_lines, recover_lines, write_json_atomic, write_jsonl
from hallulib.models import pick_device
from hallulib.recipe import Recipe
from hallulib.run import Run, stage

JUDGED = 32  # summaries judged between two writes to disk


@dataclass(frozen=True)
class EvaluationResult:
    """What the evaluation stage wrote to summary.json."""

    summary: dict[str, Any]

    @property
    def notes(self) -> dict[str, Any]:
        """What the run's manifest keeps of it."""
        return {"n": self.summary["n"], "detector": self.summary["detector"]}


def load_evaluation_result(run: Run) -> EvaluationResult:
    """Read the result of a finished evaluation. Raises MissingArtifact if there is none."""
    return EvaluationResult(json.loads(run.require("evaluation/summary.json").read_text("utf-8")))


@stage("evaluation", load=load_evaluation_result)
def evaluate_systems(recipe: Recipe, run: Run) -> EvaluationResult:
    """Generate greedily with base, SFT, DPO and the arms on the same test items, judge, and report.

    Writes evaluation/{generations,evaluation}.jsonl, summary.json, report.html and model_card.md.
    An interrupted call continues with the rows it lacks. Raises RecipeError when the detector is
    the one that made the pairs.
    """
    is_independent = recipe.pairs.judge != recipe.evaluation.detector
    if not is_independent and not recipe.evaluation.force_same_detector:
        raise RecipeError(
            f"evaluation.detector is {recipe.evaluation.detector!r}, which also judged the pairs: "
            "training on a detector and reporting with it overstates the effect",
            "set evaluation.detector to another one (facts, for the clinic world), or "
            "evaluation.force_same_detector=true if there is none: the report will say so",
        )
    rows = choose_items(read_rows(run.require("data/test.parquet")), recipe.evaluation.notes)
    detector = build_detector(recipe)
    detector.judge(read_source(rows[0]), "")  # one that cannot judge this says so before hours
    generations = generate_all(recipe, run, rows)
    work = run.checkpoint_dir("evaluation", recipe) / "judged.jsonl"
    records = judge_all(detector, rows, generations, work)
    written = groupby(generations, key=itemgetter("system"))
    summary = build_summary(records, recipe.seed) | {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "texts": {name: measure_texts(list(own), recipe.seed) for name, own in written},
        "independent_detector": is_independent,
    }
    folder = run.path("evaluation")
    write_jsonl(folder / "generations.jsonl", generations)
    write_jsonl(folder / "evaluation.jsonl", records)
    write_json_atomic(folder / "summary.json", summary)
    write_report(folder / "report.html", summary, records, generations)
    write_model_card(folder / "model_card.md", recipe, run, summary)
    return EvaluationResult(summary)


def choose_items(rows: list[Row], count: int) -> list[Row]:
    """The first `count` items (0 = all), taken in turn from each style group, so that a small
    evaluation has both. Raises DataError when two share an id: systems are compared by it."""
    (name, times), *_ = Counter(row["id"] for row in rows).most_common(1)
    if times > 1:
        raise DataError(
            f"data/test.parquet has the id {name!r} more than once",
            "give each test row an id of its own in the source file, and run 01_data_prep again",
        )
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["style_group"], []).append(row)
    turns = zip_longest(*groups.values())
    return [row for turn in turns for row in turn if row is not None][: count or None]


def build_detector(recipe: Recipe) -> Detector:
    """The detector that reports. An entailment model goes where the language model goes."""
    settings, options = recipe.evaluation, {}
    if settings.detector == "nli":
        options = {"name_or_path": settings.nli_model, "device": pick_device(recipe)}
    return get_detector(settings.detector, **options)


def judge_all(
    detector: Detector, rows: list[Row], generations: Sequence[Row], path: Path
) -> list[Row]:
    """Rows of evaluation.jsonl, in the order of the generations. What an interrupted call has
    written to `path` is used again: an entailment model may take hours."""
    sources = {row["id"]: read_source(row) for row in rows}
    done = {(r["system"], r["id"]): r for r in recover_lines(path)}
    todo = [g for g in generations if (g["system"], g["id"]) not in done]
    bar = tqdm(total=len(todo), desc=f"judging with {detector.name}", unit="summary")
    with path.open("a", encoding="utf-8") as file, bar:
        for start in range(0, len(todo), JUDGED):
            chunk = todo[start : start + JUDGED]
            records = [make_record(g, judge_one(detector, sources[g["id"]], g)) for g in chunk]
            append_lines(file, records)
            done |= {(r["system"], r["id"]): r for r in records}
            bar.update(len(chunk))
    return [done[g["system"], g["id"]] for g in generations]


def judge_one(detector: Detector, source: Source, generation: Row) -> Judgement:
    """Verdicts on one summary. A detector that knows no facts finds omissions the other way round:
    what the reference states and the summary, as its source, does not support."""
    text, reference = generation["text"], generation["reference"]
    judged = detector.judge(source, text)
    if judged.stated or not reference.strip():
        return judged
    # An empty summary lacks every statement of the reference; as a source it cannot be read.
    asked = detector.judge(Source(text if text.strip() else reference), reference).statements
    readable = [s for s in asked if s.verdict != "unparsed"]
    lacking = [s.text for s in readable if s.is_error or not text.strip()]
    unit = "statements of the reference"
    return replace(judged, omissions=lacking, stated=len(readable), stated_unit=unit)
