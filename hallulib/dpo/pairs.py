"""Preference pairs of four origins behind one function; every pair says where it is from.

sampled     best against worst of the SFT policy's own summaries, as a judge sees them
perturbed   a reference against itself with one typed, minimal error
twin        MedHal's factual statement against the non-factual one of the same note
given       the chosen and the rejected side of the user's own file
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

from hallulib.data.audit import (
    count_completion_tokens,
    count_prompt_tokens,
    describe_cuts,
    describe_length_bias,
)
from hallulib.detectors import choose_edits
from hallulib.dpo.sampled import Samples, build_judge, choose_pair, collect_samples, judge_sample
from hallulib.errors import DataError
from hallulib.files import storage_guard, write_text_atomic
from hallulib.generation import Generation
from hallulib.models import load_tokenizer
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage

BEYOND = "beyond pairs.max_pairs"


@dataclass(frozen=True)
class PairsResult:
    """What was made. `counts` tells what became of every note; errors are as the judge saw them.

    `notes` has the rest: origin, judge, yield, error types, kinds of edit, length bias, cuts.
    """

    train: int
    validation: int
    counts: dict[str, int]
    chosen_errors: float
    rejected_errors: float
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Draft:
    """One note's pair: judged sides, and what was edited ("" where nothing was)."""

    chosen: dict[str, Any]
    rejected: dict[str, Any]
    error_types: list[str]
    edit: str = ""


Drafts = dict[str, Draft | str]  # note id -> its pair, or why there is none


def load_pairs_result(run: Run) -> PairsResult:
    """Read the result of a finished pass back from the run."""
    return _make_result(run.manifest["stages"]["pairs"]["notes"])


def _make_result(notes: dict[str, Any]) -> PairsResult:
    names = ("train", "validation", "counts", "chosen_errors", "rejected_errors")
    return PairsResult(**{name: notes[name] for name in names}, notes=notes)


@stage("pairs", load=load_pairs_result)
def build_pairs(recipe: Recipe, run: Run) -> PairsResult:
    """Make the pairs of `pairs.origin`; writes pairs/train.parquet, validation.parquet and
    candidates.jsonl, where both sides of every pair (or all samples) are shown as judged.

    Sampling is written down as it goes, so an interrupted pass goes on where it stopped.
    Raises DataError when too few notes give a pair.
    """
    notes = draw_notes(pd.read_parquet(run.require("data/train.parquet")), recipe)
    if recipe.pairs.origin == "sampled":
        samples = collect_samples(notes, recipe, run)
        drafts = {name: draft_sampled(samples[name]) for name in notes["id"]}
    else:
        make = draft_perturbed if recipe.pairs.origin == "perturbed" else draft_ready
        drafts = make(notes, recipe)
        samples = {name: _list_sides(draft) for name, draft in drafts.items()}
    return _write_pairs(notes, drafts, samples, recipe, run)


def draw_notes(frame: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """Return `pairs.notes` training notes: a random choice that more notes only add to."""
    order = frame["id"].map(lambda name: sha256(f"{recipe.seed} {name}".encode()).hexdigest())
    return frame.loc[order.sort_values().index].head(recipe.pairs.notes).reset_index(drop=True)


def draft_sampled(samples: Sequence[dict[str, Any]]) -> Draft | str:
    """Fewest errors against most, or why there is no pair."""
    pair = choose_pair(samples)
    return pair if isinstance(pair, str) else Draft(*pair, sorted(pair[1]["error_types"]))


def draft_perturbed(notes: pd.DataFrame, recipe: Recipe) -> Drafts:
    """The reference of each note against itself with one typed error (`detectors.edits`)."""
    judged = _judge_references(notes, recipe)
    usable = [note for note in notes.to_dict("records") if not isinstance(judged[note["id"]], str)]
    texts = ((note["id"], note["reference"], note["context"]) for note in usable)
    tokenizer = load_tokenizer(recipe)
    edits = choose_edits(texts, recipe.seed, lambda text: len(tokenizer.tokenize(text)))
    judge = build_judge(recipe)
    drafts: Drafts = dict(judged)
    for note in usable:
        edit = edits.get(note["id"])
        if edit is None:
            drafts[note["id"]] = "no rule applies, or only one that makes the text longer"
            continue
        wrong = _judge_text(judge, note["context"], edit.apply(note["reference"]))
        right = judged[note["id"]]
        drafts[note["id"]] = Draft(right, wrong, [edit.error_type], edit.describe())
    return drafts


def draft_ready(notes: pd.DataFrame, recipe: Recipe) -> Drafts:
    """The reference of each note against the rejected side that came with it.

    MedHal's twins are checked by the judge like all references; pairs of the user's own are taken
    as they are. Raises DataError when no note brings a rejected side.
    """
    if "rejected" not in notes or not (notes["rejected"] != "").any():
        raise DataError(
            f"pairs.origin is '{recipe.pairs.origin}', and none of {len(notes)} notes came with a "
            "rejected side",
            "use MedHal or a file with the columns chosen and rejected, or set "
            "pairs.origin=perturbed",
        )
    judged, judge = _judge_references(notes, recipe), build_judge(recipe)
    drafts: Drafts = dict(judged)
    for note in notes.to_dict("records"):
        if not note["rejected"]:
            drafts[note["id"]] = "no rejected side came with the note"
        elif not isinstance(right := judged[note["id"]], str):
            wrong = _judge_text(judge, note["context"], note["rejected"])
            drafts[note["id"]] = Draft(right, wrong, sorted(wrong["error_types"]))
    return drafts


def _judge_references(notes: pd.DataFrame, recipe: Recipe) -> dict[str, dict[str, Any] | str]:
    """Each reference as the judge sees it, or, where that is asked for, that it is not faithful."""
    judge = build_judge(recipe)
    check = recipe.pairs.check_references and recipe.pairs.origin != "given"
    found: dict[str, dict[str, Any] | str] = {}
    columns = notes[["id", "context", "reference"]]
    for name, context, reference in columns.itertuples(index=False):
        sample = _judge_text(judge, context, reference)
        found[name] = "the judge finds an error in the reference" if (
            check and sample["errors"]) else sample  # fmt: skip
    return found


def _judge_text(judge: Any, context: str, text: str) -> dict[str, Any]:
    return judge_sample(judge, context, Generation(text, [], "stop"))


def _list_sides(draft: Draft | str) -> list[dict[str, Any]]:
    return [] if isinstance(draft, str) else [draft.chosen, draft.rejected]


def _write_pairs(
    notes: pd.DataFrame, drafts: Drafts, samples: Samples, recipe: Recipe, run: Run
) -> PairsResult:
    rows, counts, errors = _collect_rows(notes, drafts, recipe)
    held_out = split_groups([row["group_id"] for row in rows], recipe)
    parts = {
        "train": [row for row in rows if row["group_id"] not in held_out],
        "validation": [row for row in rows if row["group_id"] in held_out],
    }
    if not parts["train"] or not parts["validation"]:
        raise DataError(
            f"{len(rows)} pairs from {len(notes)} notes are too few: {dict(counts)}.",
            "Raise pairs.notes"
            + (" or pairs.samples_per_note." if recipe.pairs.origin == "sampled" else
               ", or set pairs.check_references=false where you trust the references."),
        )  # fmt: skip
    described = describe_pairs(rows, recipe)
    refuse_cut_pairs(described["cuts"], recipe)
    for name, part in parts.items():
        _write_parquet(pd.DataFrame(part), run.path(f"pairs/{name}.parquet"))
    lines = ({"id": name, "samples": samples[name]} for name in notes["id"] if samples[name])
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text_atomic(run.path("pairs/candidates.jsonl"), text)
    means = [sum(side) / len(errors) for side in zip(*errors, strict=True)]
    report = {"train": len(parts["train"]), "validation": len(parts["validation"]),
              "counts": dict(counts), "chosen_errors": means[0], "rejected_errors": means[1],
              "judge": build_judge(recipe).name,
              "yield": (counts["pair"] + counts[BEYOND]) / len(notes)}  # fmt: skip
    return _make_result(report | described)


def _collect_rows(
    notes: pd.DataFrame, drafts: Drafts, recipe: Recipe
) -> tuple[list[dict[str, Any]], Counter[str], list[tuple[int, int]]]:
    """Rows of pairs/*.parquet, what became of each note, errors per (chosen, rejected)."""
    rows, counts, errors = [], Counter(), []
    for note in notes.to_dict("records"):
        draft = drafts[note["id"]]
        if isinstance(draft, str):
            counts[draft] += 1
        elif recipe.pairs.max_pairs and len(rows) >= recipe.pairs.max_pairs:
            counts[BEYOND] += 1
        else:
            counts["pair"] += 1
            errors.append((draft.chosen["errors"], draft.rejected["errors"]))
            rows.append(
                {key: note[key] for key in ("id", "group_id", "prompt")}
                | {"chosen": draft.chosen["text"], "rejected": draft.rejected["text"]}
                | {"origin": recipe.pairs.origin, "error_types": draft.error_types}
                | {"edit": draft.edit}
            )
    return rows, counts, errors


def describe_pairs(rows: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """{origin, error_types, edits: kind -> pairs, length_bias, cuts} of pairs, lengths in tokens.

    `cuts` tells what model.max_length would do to the longer side of each pair.
    """
    tokenizer = load_tokenizer(recipe)
    chosen, rejected = (
        count_completion_tokens(tokenizer, [row[side] for row in rows])
        for side in ("chosen", "rejected")
    )
    prompts = count_prompt_tokens(tokenizer, [row["prompt"] for row in rows])
    longer = chosen.clip(min=rejected)
    edits = Counter(row["edit"].partition(":")[0] for row in rows if row["edit"])
    return {
        "origin": recipe.pairs.origin,
        "error_types": dict(Counter(kind for row in rows for kind in row["error_types"])),
        "edits": dict(edits),
        "length_bias": describe_length_bias(chosen, rejected),
        "cuts": describe_cuts(prompts, longer, recipe.model.max_length),
    }


def refuse_cut_pairs(cuts: dict[str, Any], recipe: Recipe) -> None:
    """Raise DataError when more pairs than data.max_cut_share exceed model.max_length."""
    if cuts["cut_share"] > recipe.data.max_cut_share:
        raise DataError(
            f"{cuts['cut']} pairs ({cuts['cut_share']:.1%}) exceed model.max_length of "
            f"{recipe.model.max_length} tokens",
            f"raise model.max_length, or accept it with data.max_cut_share (now "
            f"{recipe.data.max_cut_share})",
        )


def split_groups(groups: Sequence[str], recipe: Recipe) -> set[str]:
    """Return the groups held out for validation: a share of them, at least one, never a part."""
    distinct = sorted(
        set(groups), key=lambda group: sha256(f"{recipe.seed} {group}".encode()).hexdigest()
    )
    return set(distinct[: max(1, round(len(distinct) * recipe.pairs.validation_share))])


def _write_parquet(frame: pd.DataFrame, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_parquet(temporary, index=False)
        os.replace(temporary, path)
