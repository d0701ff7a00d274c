"""The audit of the data: lengths, cuts, damage, leaks. Written down before anything is trained."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ftfy import is_bad

from hallulib.clinic.notes import KINDS
from hallulib.data.near_duplicates import find_near_leaks
from hallulib.data.schema import read_source
from hallulib.data.splits import find_leaks
from hallulib.detectors import FactsDetector
from hallulib.errors import DataError
from hallulib.rates import rate
from hallulib.tokens import (
    count_completion_tokens,
    count_equal_after_cut,
    count_prompt_tokens,
    describe_cuts,
    describe_length_bias,
    summarise_lengths,
)

Row = dict[str, str]
BINS = 30
EXAMPLES = 3  # ids named per finding
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,80}>|&(?:[a-z]{2,8}|#\d{1,5});")


def audit_splits(
    splits: Mapping[str, Sequence[Row]], tokenizer: Any, max_length: int, near: float
) -> dict[str, Any]:
    """Return {max_length, prompt_tokens, reference_tokens, splits: {name: ...}, leaks} for rows.

    Lengths are in tokens of `tokenizer`, prompts after the chat template, references with their
    end token. `near` is the similarity from which two notes count as the same (0: not looked for).
    """
    lengths = {name: measure_lengths(rows, tokenizer) for name, rows in splits.items()}
    prompts = np.concatenate([sides["prompt"] for sides in lengths.values()])
    references = np.concatenate([sides["reference"] for sides in lengths.values()])
    return {
        "max_length": max_length,
        "prompt_tokens": summarise_lengths(prompts),
        "reference_tokens": summarise_lengths(references),
        "splits": {
            name: _audit_rows(rows, lengths[name], tokenizer, max_length)
            for name, rows in splits.items()
        },
        "leaks": {
            "groups": find_leaks(splits, "group_id")[:EXAMPLES],
            "contexts": len(find_leaks(splits, "context")),
            "near_duplicates": find_near_leaks(splits, near) if near else None,
            "threshold": near,
        },
    }


def measure_lengths(rows: Sequence[Row], tokenizer: Any) -> dict[str, np.ndarray]:
    """Tokens of each row's prompt, reference and, of the rows that have one, rejected side."""
    worse = [row["rejected"] for row in rows if row["rejected"]]
    return {
        "prompt": count_prompt_tokens(tokenizer, [row["prompt"] for row in rows]),
        "reference": count_completion_tokens(tokenizer, [row["reference"] for row in rows]),
        "rejected": count_completion_tokens(tokenizer, worse),
    }


def _audit_rows(
    rows: Sequence[Row], lengths: dict[str, np.ndarray], tokenizer: Any, max_length: int
) -> dict[str, Any]:
    prompts, references, rejected = lengths.values()
    total = prompts + references
    # the last bin holds all that is longer, so that one giant row does not flatten the figure
    top = max(max_length, int(np.percentile(total, 99)))
    edges = np.linspace(0, top, BINS + 1).astype(int)
    paired = np.array([bool(row["rejected"]) for row in rows])
    sides = [(row["reference"], row["rejected"]) for row in rows if row["rejected"]]
    room = max_length - prompts[paired]
    return {
        "rows": len(rows),
        "groups": len({row["group_id"] for row in rows}),
        "styles": dict(Counter(row["style"] for row in rows if row["style"])),
        "prompt_tokens": summarise_lengths(prompts),
        "reference_tokens": summarise_lengths(references),
        "rejected_tokens": summarise_lengths(rejected),
        "total_tokens": summarise_lengths(total),
        **describe_cuts(prompts, references, max_length),
        "pairs_equal_after_cut": count_equal_after_cut(tokenizer, sides, room),
        "length_bias": describe_length_bias(references[paired], rejected),
        "sources": _count_sources(rows, total > max_length),
        "duplicate_contexts": len(rows) - len({row["context"] for row in rows}),
        "duplicate_references": len(rows) - len({row["reference"] for row in rows}),
        "findings": find_damage(rows),
        "histogram": {
            "edges": edges.tolist(),
            **{
                name: np.histogram(side.clip(max=top), edges)[0].tolist()
                for name, side in (lengths | {"total": total}).items()
            },
        },
    }


def _count_sources(rows: Sequence[Row], cut: np.ndarray) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for row, over in zip(rows, cut, strict=True):
        source = counts.setdefault(row["source"], {"rows": 0, "cut": 0, "with_rejected": 0})
        source["rows"] += 1
        source["cut"] += int(over)
        source["with_rejected"] += bool(row["rejected"])
    return counts


def _is_no_text(text: str) -> bool:
    """Fewer letters than half of what is not blank: a table, a number, an encoded file."""
    signs = [sign for sign in text if not sign.isspace()]
    return bool(signs) and sum(map(str.isalpha, signs)) < len(signs) / 2


def _has_control_signs(text: str) -> bool:
    return any(unicodedata.category(sign) == "Cc" and sign not in "\t\n\r" for sign in text)


CHECKS: dict[str, Callable[[str], bool]] = {
    "empty": lambda text: not text.strip(),
    "not_words": _is_no_text,
    "encoding_damage": lambda text: "\N{REPLACEMENT CHARACTER}" in text or is_bad(text),
    "control_signs": _has_control_signs,
    "markup": lambda text: bool(_MARKUP.search(text)),
}


def find_damage(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """"column: finding" -> {rows, examples: ids} of what is wrong with prompts and completions.

    Encoding damage is text decoded wrongly once ("Ã©" for "é", by ftfy's rules). Nothing is
    repaired: whether "&lt;" belongs in a note, only its owner knows.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        for column in ("prompt", "reference", "rejected"):
            text = row[column]
            if column == "rejected" and not text:
                continue
            for name, check in CHECKS.items():
                if check(text):
                    found.setdefault(f"{column}: {name}", []).append(row["id"])
        if row["rejected"] and row["reference"].strip() == row["rejected"].strip():
            found.setdefault("reference and rejected: identical", []).append(row["id"])
        if row["reference"].strip() == row["context"].strip():
            found.setdefault("reference: copies the whole note", []).append(row["id"])
    return {name: {"rows": len(ids), "examples": ids[:EXAMPLES]} for name, ids in found.items()}


def tabulate_audit(audit: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The audit as one table: split -> {what: figure}, made for pandas.DataFrame."""
    table = {}
    for name, part in audit["splits"].items():
        bias = part["length_bias"] or {}
        table[name] = {
            "rows": part["rows"],
            "groups": part["groups"],
            "longest prompt": part["prompt_tokens"]["max"],
            "longest reference": part["reference_tokens"]["max"],
            "rows over max_length": part["cut"],
            "label tokens lost if cut": f"{part['label_tokens_lost']:.1%}",
            "rows without a label if cut": part["labels_all_lost"],
            "prompt tokens lost if shortened": f"{part['prompt_tokens_lost']:.1%}",
            "same note twice": part["duplicate_contexts"],
            "same reference twice": part["duplicate_references"],
            "rows with a rejected side": bias.get("pairs", 0),
            "the shorter side is the chosen one": (
                f"{bias['preferred_shorter']:.0%}" if bias else "-"
            ),
        }
        table[name] |= {what: found["rows"] for what, found in part["findings"].items()}
    return table


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
        "summary": rate(unfaithful, len(judged), "reference").to_dict(),
        "statement": rate(len(wrong), len(statements), "statement").to_dict(),
        "by_kind": dict(Counter(s.kind for s in wrong).most_common()),
        "in_note": {kind: in_note[kind] / len(known) for kind in KINDS},
        "in_reference": {kind: stated[kind] / len(known) for kind in KINDS},
    }
