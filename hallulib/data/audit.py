"""The token audit: how long prompts and references are, and what `max_length` would cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hallulib.clinic.notes import KINDS
from hallulib.data.schema import read_source
from hallulib.data.splits import find_leaks
from hallulib.detectors import FactsDetector
from hallulib.evaluation.statistics import estimate_proportion
from hallulib.models import render_prompt

PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
BINS = 30


def audit_splits(
    splits: Mapping[str, Sequence[dict[str, str]]], tokenizer: Any, max_length: int
) -> dict[str, Any]:
    """Return {max_length, prompt_tokens, reference_tokens, splits: {name: ...}, group_leaks,
    context_leaks} for rows of the schema.

    Lengths are in tokens of `tokenizer`, prompts after the chat template, references with their
    end token; `cut` counts rows whose prompt and reference together exceed max_length.
    """
    lengths = {name: measure_lengths(rows, tokenizer) for name, rows in splits.items()}
    prompts, references = (np.concatenate(part) for part in zip(*lengths.values(), strict=True))
    return {
        "max_length": max_length,
        "prompt_tokens": summarise_lengths(prompts),
        "reference_tokens": summarise_lengths(references),
        "splits": {
            name: _audit_rows(rows, *lengths[name], max_length) for name, rows in splits.items()
        },
        "group_leaks": len(find_leaks(splits, "group_id")),
        "context_leaks": len(find_leaks(splits, "context")),
    }


def measure_lengths(
    rows: Sequence[dict[str, str]], tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row's prompt (as the model sees it) and reference (with its end token)."""
    prompts = count_tokens(tokenizer, [render_prompt(tokenizer, row["prompt"]) for row in rows])
    return prompts, count_tokens(tokenizer, [row["reference"] for row in rows]) + 1


def _audit_rows(
    rows: Sequence[dict[str, str]], prompts: np.ndarray, references: np.ndarray, max_length: int
) -> dict[str, Any]:
    total = prompts + references
    edges = np.linspace(0, max(max_length, int(total.max())), BINS + 1).astype(int)
    return {
        "rows": len(rows),
        "groups": len({row["group_id"] for row in rows}),
        "styles": dict(Counter(row["style"] for row in rows if row["style"])),
        "prompt_tokens": summarise_lengths(prompts),
        "reference_tokens": summarise_lengths(references),
        "total_tokens": summarise_lengths(total),
        "cut": int((total > max_length).sum()),
        "cut_share": float((total > max_length).mean()),
        "reference_all_cut": int((prompts >= max_length).sum()),
        "empty_prompts": sum(not row["prompt"].strip() for row in rows),
        "empty_references": sum(not row["reference"].strip() for row in rows),
        "duplicate_contexts": len(rows) - len({row["context"] for row in rows}),
        "duplicate_references": len(rows) - len({row["reference"] for row in rows}),
        "histogram": {
            "edges": edges.tolist(),
            "prompt": np.histogram(prompts, edges)[0].tolist(),
            "reference": np.histogram(references, edges)[0].tolist(),
            "total": np.histogram(total, edges)[0].tolist(),
        },
    }


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Tokens per text, without added special tokens: shape (len(texts),)."""
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return np.array([len(row) for row in ids])


def summarise_lengths(lengths: np.ndarray) -> dict[str, float]:
    """{min, mean, p5 ... p99, max} of token counts."""
    cut_points = {f"p{p}": float(np.percentile(lengths, p)) for p in PERCENTILES}
    return {
        "min": int(lengths.min()), "mean": round(float(lengths.mean()), 1), **cut_points,
        "max": int(lengths.max()),
    }  # fmt: skip


def audit_references(rows: Sequence[dict[str, str]]) -> dict[str, Any] | None:
    """How often a reference states what its note does not, by the exact checker.

    Returns {summary: proportion, statement: proportion, by_kind: kind -> wrong statements,
    in_note and in_reference: kind -> share of rows that state it}, or None where the facts are not
    known.
    """
    known = [(row, read_source(row)) for row in rows if row["facts"]]
    detector = FactsDetector()
    judged = [detector.judge(source, row["reference"]) for row, source in known]
    statements = [s for judgement in judged for s in judgement.statements]
    if not statements:
        return None
    wrong = [s for s in statements if s.is_error]
    unfaithful = sum(bool(judgement.hallucinated) for judgement in judged)
    in_note = Counter(kind for _, source in known for kind in source.facts if kind in KINDS)
    stated = Counter(kind for j in judged for kind in {s.kind for s in j.statements})
    return {
        "summary": estimate_proportion(unfaithful, len(judged), "reference").to_dict(),
        "statement": estimate_proportion(len(wrong), len(statements), "statement").to_dict(),
        "by_kind": dict(Counter(s.kind for s in wrong).most_common()),
        "in_note": {kind: in_note[kind] / len(known) for kind in KINDS},
        "in_reference": {kind: stated[kind] / len(known) for kind in KINDS},
    }
