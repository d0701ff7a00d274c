"""The audit of the data: lengths, cuts, damage, leaks. Written down before anything is trained."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from ftfy import is_bad

from hallulib.clinic import KINDS, check
from hallulib.data import lengths
from hallulib.data.schema import Row, read_facts
from hallulib.data.splits import find_leaks, find_near_leaks
from hallulib.errors import DataError
from hallulib.rates import rate

BINS = 30
EXAMPLES = 3  # ids named per finding


def audit_splits(
    splits: Mapping[str, Sequence[Row]], tokenizer: Any, max_length: int, near: float
) -> dict[str, Any]:
    """Return {max_length, splits: {name: figures}, leaks}, lengths in tokens.

    `near` is the similarity from which two notes count as the same (0: not looked for).
    """
    return {
        "max_length": max_length,
        "splits": {name: _audit_rows(rows, tokenizer, max_length) for name, rows in splits.items()},
        "leaks": {
            "groups": find_leaks(splits, "group_id")[:EXAMPLES],
            "contexts": len(find_leaks(splits, "context")),
            "near_duplicates": find_near_leaks(splits, near) if near else None,
        },
    }


def _audit_rows(rows: Sequence[Row], tokenizer: Any, max_length: int) -> dict[str, Any]:
    frame = pd.DataFrame(rows)
    paired = (frame["rejected"] != "").to_numpy()
    prompts = lengths.count_prompt_tokens(tokenizer, list(frame["prompt"]))
    references = lengths.count_completion_tokens(tokenizer, list(frame["reference"]))
    rejected = lengths.count_completion_tokens(tokenizer, list(frame["rejected"][paired]))
    total = prompts + references
    sides = {"prompt": prompts, "reference": references, "rejected": rejected, "total": total}
    # the last bin holds all that is longer, so that one giant row does not flatten the figure
    top = max(max_length, int(np.percentile(total, 99)))
    edges = np.linspace(0, top, BINS + 1).astype(int)
    return {
        "rows": len(frame),
        "groups": frame["group_id"].nunique(),
        "sources": frame["source"].value_counts().to_dict(),
        **{f"{side}_tokens": _summarise_lengths(n) for side, n in sides.items()},
        **lengths.describe_cuts(prompts, references, max_length),
        "length_bias": lengths.describe_length_bias(references[paired], rejected),
        "duplicate_contexts": int(frame["context"].duplicated().sum()),
        "duplicate_references": int(frame["reference"].duplicated().sum()),
        "findings": find_damage(rows),
        "histogram": {"edges": edges.tolist()}
        | {side: np.histogram(n.clip(max=top), edges)[0].tolist() for side, n in sides.items()},
    }


def _summarise_lengths(tokens: np.ndarray) -> dict[str, int] | None:
    """Whole tokens at percentiles; None where there are no texts."""
    if not len(tokens):
        return None
    points = {"min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}
    return {name: int(np.percentile(tokens, point)) for name, point in points.items()}


def _is_no_text(text: str) -> bool:
    """Fewer letters than half of what is not blank: a table, a number, an encoded file."""
    signs = "".join(text.split())
    return sum(map(str.isalpha, signs)) < len(signs) / 2


CHECKS = {
    "empty": lambda text: not text.strip(),
    "not_words": _is_no_text,
    "encoding_damage": lambda text: "\N{REPLACEMENT CHARACTER}" in text or is_bad(text),
    "control_signs": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]").search,
    "markup": re.compile(r"</?[a-zA-Z][^<>]{0,80}>|&(?:[a-z]{2,8}|#\d{1,5});").search,
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
    tokens, limit = part["total_tokens"], audit["max_length"]
    raise DataError(
        f"{part['cut']} of {part['rows']} training rows ({part['cut_share']:.1%}) exceed "
        f"model.max_length of {limit} tokens (half need {tokens['p50']} or more, the longest "
        f"{tokens['max']}). Cut, {part['labels_all_lost']} of them would have no label left. "
        "See data/audit.json",
        "raise model.max_length, leave long rows out with data.max_chars, or accept it with "
        f"data.max_cut_share (now {max_cut_share})",
    )


def audit_references(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How often a reference states what its note does not, by the exact checker.

    Returns {summary: rate of references with a wrong statement, by_kind: kind -> wrong statements,
    in_note and in_reference: kind -> share of rows that state it}, or None without facts.
    """
    facts = [read_facts(row) for row in rows if row["facts"]]
    checked = [check(read_facts(row), row["reference"]) for row in rows if row["facts"]]
    if not any(checked):
        return None
    wrong = [[s["kind"] for s in found if s["verdict"] != "supported"] for found in checked]
    in_note = Counter(kind for known in facts for kind in known)
    stated = Counter(kind for found in checked for kind in {s["kind"] for s in found})
    return {
        "summary": rate(sum(map(bool, wrong)), len(checked), "references").to_dict(),
        "by_kind": dict(Counter(kind for kinds in wrong for kind in kinds).most_common()),
        "in_note": {kind: in_note[kind] / len(facts) for kind in KINDS},
        "in_reference": {kind: stated[kind] / len(checked) for kind in KINDS},
    }
