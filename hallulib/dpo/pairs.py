"""Preference pairs of four origins behind one function; every pair says where it is from.

sampled     best against worst of the SFT policy's own summaries, as a judge sees them: a policy
            learns little from telling apart texts it would not write
perturbed   a reference against itself with one typed, minimal error
twin        MedHal's factual statement against the non-factual one of the same note
given       the chosen and the rejected side of the user's own file
"""

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from statistics import fmean
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

from hallulib.data import lengths
from hallulib.detectors import Detector, NoisyJudge, Source, choose_edits, get_detector
from hallulib.errors import DataError
from hallulib.files import append_lines, recover_lines, write_jsonl
from hallulib.generation import generate_summaries, limit_new_tokens
from hallulib.models import load_policy, load_tokenizer
from hallulib.recipe import Recipe
from hallulib.recipe_sections import PairsSection
from hallulib.run import Result, Run, stage

BEYOND = "beyond pairs.max_pairs"
Row = dict[str, Any]  # a note of data/train.parquet, or a pair of pairs/*.parquet
Sample = dict[str, Any]  # a text as the judge sees it, see judge_text
Draft = dict[str, Any] | str  # {chosen, rejected: Sample, error_types, edit}, or why there is none


@stage("pairs")
def build_pairs(recipe: Recipe, run: Run) -> Result:
    """Make the pairs of `pairs.origin`; writes pairs/train.parquet, validation.parquet and
    candidates.jsonl, where both sides of every pair (or all samples) are shown as judged.

    Notes: pairs per split; counts, what became of every note; mean chosen_errors and
    rejected_errors as the judge saw them; judge, yield, origin, error_types, edits, length_bias,
    cuts. Raises DataError when too few notes give a pair, or too many pairs would be cut.
    """
    section, tokenizer = recipe.pairs, load_tokenizer(recipe)
    frame = pd.read_parquet(run.require("data/train.parquet"))
    notes, judge = draw_notes(frame, section.notes, recipe.seed), build_judge(section, recipe.seed)
    if section.origin == "sampled":
        candidates = sample_notes(recipe, run, notes, tokenizer, judge)
        drafts = {name: choose_pair(samples) for name, samples in candidates.items()}
    else:
        drafts = draft_references(notes, section, recipe.seed, tokenizer, judge)
        made = {name: draft for name, draft in drafts.items() if isinstance(draft, dict)}
        candidates = {name: [draft["chosen"], draft["rejected"]] for name, draft in made.items()}
    rows, counts = make_rows(notes, drafts, section)
    parts = split_rows(rows, section.validation_share, recipe.seed)
    if not all(parts.values()):
        more = "set pairs.check_references=false where you trust the references"
        more = "pairs.samples_per_note" if section.origin == "sampled" else more
        what = f"{counts['pair']} pairs from {len(notes)} notes are too few: {dict(counts)}."
        raise DataError(what, f"Raise pairs.notes, or {more}.")
    report = {split: len(part) for split, part in parts.items()} | {"counts": dict(counts)}
    for side in ("chosen", "rejected"):
        report[f"{side}_errors"] = fmean(drafts[row["id"]][side]["errors"] for row in rows)
    report |= {"judge": judge.name, "yield": (counts["pair"] + counts[BEYOND]) / len(notes)}
    report |= describe_pairs(rows, tokenizer, recipe)
    run.path("pairs").mkdir(exist_ok=True)
    for split, part in parts.items():
        pd.DataFrame(part).to_parquet(run.path(f"pairs/{split}.parquet"), index=False)
    names = [note["id"] for note in notes if note["id"] in candidates]
    lines = [{"id": name, "samples": candidates[name]} for name in names]
    write_jsonl(run.path("pairs/candidates.jsonl"), lines)
    return Result(run.path("pairs/train.parquet"), report)


def draw_notes(frame: pd.DataFrame, count: int, seed: int) -> list[Row]:
    """Return `count` training notes: a random choice that more notes only add to."""
    order = frame["id"].map(lambda name: sha256(f"{seed} {name}".encode()).hexdigest())
    return frame.loc[order.sort_values().index].head(count).to_dict("records")


def sample_notes(
    recipe: Recipe, run: Run, notes: Sequence[Row], tokenizer: Tokenizer, judge: Detector
) -> dict[str, list[Sample]]:
    """Sample the SFT policy on every note, and judge: note id -> samples.

    Every batch of `pairs.batch_size` summaries moves the bar and is on the disk, and is not done
    again after an interruption.
    """
    section, file = recipe.pairs, run.checkpoint_dir("pairs", recipe) / "candidates.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {row["id"]: row["samples"] for row in recover_lines(file)}
    if done:
        print(f"pairs: {len(done)} of {len(notes)} notes were sampled before the interruption")
    todo = [note for note in notes if note["id"] not in done]
    if not todo:
        return done
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=False)
    references = pd.read_parquet(run.require("data/train.parquet"))["reference"]
    limit = limit_new_tokens(tokenizer, references.head(1000))
    tokens = lengths.count_prompt_tokens(tokenizer, [note["prompt"] for note in todo])
    todo = [todo[i] for i in tokens.argsort(kind="stable")]  # little padding
    size = max(1, section.batch_size // section.samples_per_note)
    with file.open("a", encoding="utf-8") as out, tqdm(total=len(todo), unit="note") as bar:
        bar.set_description("sampling pairs")
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            texts = generate_summaries(
                policy, tokenizer, [note["prompt"] for note in batch],
                batch_size=section.batch_size, max_new_tokens=limit, seed=recipe.seed,
                temperature=section.temperature, num_samples=section.samples_per_note,
            )  # fmt: skip
            for note, own in zip(batch, texts, strict=True):
                judged = [judge_text(judge, note["context"], t.text, t.finish_reason) for t in own]
                done[note["id"]] = judged
            append_lines(out, ({"id": n["id"], "samples": done[n["id"]]} for n in batch))
            bar.update(len(batch))
    return done


def build_judge(section: PairsSection, seed: int) -> Detector:
    """Return the judge that ranks samples: rule-based, with the errors a real judge has."""
    rates = section.judge_false_positive_rate, section.judge_false_negative_rate
    return NoisyJudge(get_detector(section.judge), *rates, seed=seed)


def judge_text(judge: Detector, context: str, text: str, finish_reason: str = "stop") -> Sample:
    """Return a text with what the judge, which sees the note's text only, says of it."""
    judged = judge.judge(Source(text=context), text)
    return {
        "text": text,
        "finish_reason": finish_reason,
        "errors": judged.errors,
        "statements": len(judged.statements),
        "error_types": [s.error_type or "other" for s in judged.statements if s.is_error],
        "verdicts": [{"text": s.text, "verdict": s.verdict} for s in judged.statements],
    }


def choose_pair(samples: Sequence[Sample]) -> Draft:
    """Return fewest errors against most; or why these samples make no pair.

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
    kinds = sorted(rejected["error_types"])
    return {"chosen": chosen, "rejected": rejected, "error_types": kinds, "edit": ""}


def draft_references(
    notes: Sequence[Row], section: PairsSection, seed: int, tokenizer: Tokenizer, judge: Detector
) -> dict[str, Draft]:
    """The reference of each note against itself with one typed error ("perturbed"), or against the
    rejected side that came with it. Raises DataError when no note brings one."""
    perturbs, checks = section.origin == "perturbed", section.origin != "given"
    if not perturbs and not any(note["rejected"] for note in notes):
        raise DataError(
            f"pairs.origin is '{section.origin}', and none of {len(notes)} notes came with a "
            "rejected side",
            "use MedHal, a file with the columns chosen and rejected, or pairs.origin=perturbed",
        )
    drafts: dict[str, Draft] = {}
    for note in notes:
        chosen = judge_text(judge, note["context"], note["reference"])
        if not perturbs and not note["rejected"]:
            drafts[note["id"]] = "no rejected side came with the note"
        elif checks and section.check_references and chosen["errors"]:
            drafts[note["id"]] = "the judge finds an error in the reference"
        else:
            drafts[note["id"]] = {"chosen": chosen}
    usable = [note for note in notes if isinstance(drafts[note["id"]], dict)]
    texts = ((note["id"], note["reference"], note["context"]) for note in usable)
    edits = choose_edits(texts, seed, lambda t: len(tokenizer.tokenize(t))) if perturbs else {}
    for note in usable:
        name, edit = note["id"], edits.get(note["id"])
        if perturbs and edit is None:
            drafts[name] = "no rule applies, or only one that makes the text longer"
            continue
        text = edit.apply(note["reference"]) if edit else note["rejected"]
        rejected = judge_text(judge, note["context"], text)
        kinds = [edit.error_type] if edit else sorted(rejected["error_types"])
        said = edit.describe() if edit else ""
        drafts[name] |= {"rejected": rejected, "error_types": kinds, "edit": said}
    return drafts


def make_rows(
    notes: Sequence[Row], drafts: dict[str, Draft], section: PairsSection
) -> tuple[list[Row], Counter[str]]:
    """Rows of pairs/*.parquet, and what became of each note."""
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for note in notes:
        draft = drafts[note["id"]]
        if isinstance(draft, str):
            counts[draft] += 1
        elif section.max_pairs and len(rows) >= section.max_pairs:
            counts[BEYOND] += 1
        else:
            counts["pair"] += 1
            row = {name: note[name] for name in ("id", "group_id", "prompt")}
            row |= {side: draft[side]["text"] for side in ("chosen", "rejected")}
            row |= {"origin": section.origin, "error_types": draft["error_types"]}
            rows.append(row | {"edit": draft["edit"]})
    return rows, counts


def split_rows(rows: Sequence[Row], validation_share: float, seed: int) -> dict[str, list[Row]]:
    """Return {train, validation}: a share of the groups, at least one, never a part of one."""
    groups = {row["group_id"] for row in rows}
    order = sorted(groups, key=lambda group: sha256(f"{seed} {group}".encode()).hexdigest())
    held_out = set(order[: max(1, round(len(order) * validation_share))])
    return {
        "train": [row for row in rows if row["group_id"] not in held_out],
        "validation": [row for row in rows if row["group_id"] in held_out],
    }


def describe_pairs(rows: Sequence[Row], tokenizer: Tokenizer, recipe: Recipe) -> dict[str, Any]:
    """{origin, error_types, edits: kind -> pairs, length_bias, cuts} of pairs, lengths in tokens.

    `cuts` tells what model.max_length would do to the longer side of each pair; DataError where
    that is more than data.max_cut_share of them.
    """
    max_length, allowed = recipe.model.max_length, recipe.data.max_cut_share
    chosen = lengths.count_completion_tokens(tokenizer, [row["chosen"] for row in rows])
    rejected = lengths.count_completion_tokens(tokenizer, [row["rejected"] for row in rows])
    prompts = lengths.count_prompt_tokens(tokenizer, [row["prompt"] for row in rows])
    cuts = lengths.describe_cuts(prompts, chosen.clip(min=rejected), max_length)
    if cuts["cut_share"] > allowed:
        raise DataError(
            f"{cuts['cut']} pairs ({cuts['cut_share']:.1%}) exceed model.max_length of "
            f"{max_length} tokens",
            f"raise model.max_length, or accept it with data.max_cut_share (now {allowed})",
        )
    return {
        "origin": rows[0]["origin"],
        "error_types": dict(Counter(kind for row in rows for kind in row["error_types"])),
        "edits": dict(Counter(row["edit"].partition(":")[0] for row in rows if row["edit"])),
        "length_bias": lengths.describe_length_bias(chosen, rejected),
        "cuts": cuts,
    }
