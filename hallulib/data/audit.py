"""The audit of the data: lengths, cuts, damage, leaks. Written down before anything is trained.

Lengths and cuts are counted for rows and for preference pairs alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from ftfy import is_bad

from hallulib.clinic import KINDS, check
from hallulib.data.schema import Row, read_facts
from hallulib.data.splits import find_leaks, find_near_leaks
from hallulib.errors import DataError
from hallulib.models import render_prompt
from hallulib.rates import rate

PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
BATCH = 128  # texts tokenised at a time
BINS = 30
EXAMPLES = 3  # ids named per finding
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,80}>|&(?:[a-z]{2,8}|#\d{1,5});")


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Tokens per text, without added special tokens: shape (len(texts),)."""
    lengths: list[int] = []
    for start in range(0, len(texts), BATCH):  # a token takes a hundred bytes until it is counted
        batch = list(texts[start : start + BATCH])
        ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        lengths += map(len, ids)
    return np.array(lengths, dtype=int)


def count_prompt_tokens(tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """Tokens of each prompt as the model sees it, after the chat template."""
    return count_tokens(tokenizer, [render_prompt(tokenizer, prompt) for prompt in prompts])


def count_completion_tokens(tokenizer: Any, completions: Sequence[str]) -> np.ndarray:
    """Tokens of each completion, its end token included."""
    return count_tokens(tokenizer, completions) + 1


def summarise_lengths(lengths: np.ndarray) -> dict[str, float] | None:
    """{min, mean, p5 ... p99, max} of token counts, or None where there are none."""
    if not len(lengths):
        return None
    cut_points = {f"p{p}": float(np.percentile(lengths, p)) for p in PERCENTILES}
    return {
        "min": int(lengths.min()), "mean": round(float(lengths.mean()), 1), **cut_points,
        "max": int(lengths.max()),
    }  # fmt: skip


def describe_cuts(
    prompts: np.ndarray, completions: np.ndarray, max_length: int
) -> dict[str, int | float]:
    """What max_length does to rows of a prompt and a completion, by the end that is cut.

    cut, cut_share: rows that do not fit. Cut at the end, as many trainers do, they lose label
    tokens: `label_tokens_lost` is their share of all, `labels_all_lost` the rows without any left.
    Cut in the prompt instead, they lose `prompt_tokens_lost` (a share) of what the note says, and
    `completion_too_long` cannot be saved at all. This course leaves such rows out.
    """
    over = np.maximum(prompts + completions - max_length, 0)
    lost = np.minimum(over, completions)
    return {
        "cut": int((over > 0).sum()),
        "cut_share": float((over > 0).mean()),
        "label_tokens_lost": float(lost.sum() / completions.sum()),
        "labels_all_lost": int((lost == completions).sum()),
        "prompt_tokens_lost": float(np.minimum(over, prompts).sum() / prompts.sum()),
        "completion_too_long": int((completions >= max_length).sum()),
    }


def describe_length_bias(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float] | None:
    """How much longer the rejected side is, in tokens, or None without pairs.

    `preferred_shorter` is the share of pairs that a rule "take the shorter one" gets right, ties
    half: 0.5 means that length tells nothing about the label.
    """
    if not len(chosen):
        return None
    gap = rejected - chosen
    shorter = (gap > 0).mean() + (gap == 0).mean() / 2
    return {
        "pairs": len(gap),
        "chosen_mean": round(float(chosen.mean()), 2),
        "rejected_mean": round(float(rejected.mean()), 2),
        "mean_gap": round(float(gap.mean()), 3),
        "preferred_shorter": round(float(shorter), 4),
    }


def audit_splits(
    splits: Mapping[str, Sequence[Row]], tokenizer: Any, max_length: int, near: float
) -> dict[str, Any]:
    """Return {max_length, splits: {name: ...}, leaks} for rows.

    Lengths are in tokens of `tokenizer`, prompts after the chat template, references with their
    end token. `near` is the similarity from which two notes count as the same (0: not looked for).
    """
    return {
        "max_length": max_length,
        "splits": {name: _audit_rows(rows, tokenizer, max_length) for name, rows in splits.items()},
        "leaks": {
            "groups": find_leaks(splits, "group_id")[:EXAMPLES],
            "contexts": len(find_leaks(splits, "context")),
            "near_duplicates": find_near_leaks(splits, near) if near else None,
            "threshold": near,
        },
    }


def _audit_rows(rows: Sequence[Row], tokenizer: Any, max_length: int) -> dict[str, Any]:
    frame = pd.DataFrame(rows)
    paired = (frame["rejected"] != "").to_numpy()
    prompts = count_prompt_tokens(tokenizer, list(frame["prompt"]))
    references = count_completion_tokens(tokenizer, list(frame["reference"]))
    rejected = count_completion_tokens(tokenizer, list(frame["rejected"][paired]))
    total = prompts + references
    sides = {"prompt": prompts, "reference": references, "rejected": rejected, "total": total}
    sources = frame[["source"]].assign(rows=1, cut=total > max_length, with_rejected=paired)
    # the last bin holds all that is longer, so that one giant row does not flatten the figure
    top = max(max_length, int(np.percentile(total, 99)))
    edges = np.linspace(0, top, BINS + 1).astype(int)
    return {
        "rows": len(frame),
        "groups": frame["group_id"].nunique(),
        "styles": frame["style"][frame["style"] != ""].value_counts().to_dict(),
        **{f"{side}_tokens": summarise_lengths(n) for side, n in sides.items()},
        **describe_cuts(prompts, references, max_length),
        "length_bias": describe_length_bias(references[paired], rejected),
        "sources": sources.groupby("source").sum().to_dict("index"),
        "duplicate_contexts": int(frame["context"].duplicated().sum()),
        "duplicate_references": int(frame["reference"].duplicated().sum()),
        "findings": find_damage(rows),
        "histogram": {"edges": edges.tolist()}
        | {s: np.histogram(n.clip(max=top), edges)[0].tolist() for s, n in sides.items()},
    }


def _is_no_text(text: str) -> bool:
    """Fewer letters than half of what is not blank: a table, a number, an encoded file."""
    signs = [sign for sign in text if not sign.isspace()]
    return bool(signs) and sum(map(str.isalpha, signs)) < len(signs) / 2


CHECKS = {
    "empty": lambda text: not text.strip(),
    "not_words": _is_no_text,
    "encoding_damage": lambda text: "\N{REPLACEMENT CHARACTER}" in text or is_bad(text),
    "control_signs": lambda text: any(
        unicodedata.category(sign) == "Cc" and sign not in "\t\n\r" for sign in text
    ),
    "markup": lambda text: bool(_MARKUP.search(text)),
}


def find_damage(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """ "column: finding" -> {rows, examples: ids} of what is wrong with prompts and completions.

    Encoding damage is text decoded wrongly once ("Ã©" for "é", by ftfy's rules). Nothing is
    repaired: whether "&lt;" belongs in a note, only its owner knows.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for column in ("prompt", "reference", *(["rejected"] if row["rejected"] else [])):
            for name, is_damaged in CHECKS.items():
                if is_damaged(row[column]):
                    found[f"{column}: {name}"].append(row["id"])
        if row["rejected"] and row["reference"].strip() == row["rejected"].strip():
            found["reference and rejected: identical"].append(row["id"])
        if row["reference"].strip() == row["context"].strip():
            found["reference: copies the whole note"].append(row["id"])
    return {name: {"rows": len(ids), "examples": ids[:EXAMPLES]} for name, ids in found.items()}


def refuse_cut_rows(audit: Mapping[str, Any], max_cut_share: float) -> None:
    """Raise DataError when more of the training rows exceed max_length than the recipe allows."""
    part = audit["splits"]["train"]
    if part["cut_share"] <= max_cut_share:
        return
    raise DataError(
        f"{part['cut']} of {part['rows']} training rows ({part['cut_share']:.1%}) exceed "
        f"model.max_length of {audit['max_length']} tokens (half need "
        f"{part['total_tokens']['p50']:.0f} or more, the longest {part['total_tokens']['max']}). "
        f"Cut, {part['labels_all_lost']} of them would have no label left. See data/audit.json",
        f"raise model.max_length, leave long rows out with data.max_chars, or accept it with "
        f"data.max_cut_share (now {max_cut_share})",
    )


def audit_references(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How often a reference states what its note does not, by the exact checker.

    Returns {summary, statement: rates of wrong ones, by_kind: kind -> wrong statements, in_note and
    in_reference: kind -> share of rows that state it}, or None where the facts are not known.
    """
    facts = [read_facts(row) for row in rows if row["facts"]]
    checked = [check(read_facts(row), row["reference"]) for row in rows if row["facts"]]
    if not any(checked):
        return None
    wrong = [[s["kind"] for s in found if s["verdict"] != "supported"] for found in checked]
    by_kind = Counter(kind for kinds in wrong for kind in kinds)
    in_note = Counter(kind for known in facts for kind in known)
    stated = Counter(kind for found in checked for kind in {s["kind"] for s in found})
    return {
        "summary": rate(sum(map(bool, wrong)), len(checked), "references").to_dict(),
        "statement": rate(by_kind.total(), sum(map(len, checked)), "statements").to_dict(),
        "by_kind": dict(by_kind.most_common()),
        "in_note": {kind: in_note[kind] / len(facts) for kind in KINDS},
        "in_reference": {kind: stated[kind] / len(checked) for kind in KINDS},
    }
