"""The exact fact checker: every statement of a summary, held against what the note states.

It reads the fact table, never the note's wording, so it makes no judgement: a statement is
supported, contradicted, or not in the note. Types follow the taxonomy of the assessment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hallulib.clinic.notes import KINDS
from hallulib.clinic.summaries import SENTENCES

_FIELD = re.compile(r"\\\{(\w+)\\\}")
_SENTENCE_END = re.compile(r"\.(?=\s|$)")
_MULTIPLE = {"history", "medications", "negatives"}


def _compile_sentence(template: str) -> re.Pattern[str]:
    pattern = _FIELD.sub(r"(?P<\1>.+?)", re.escape(template.removesuffix(".")))
    return re.compile(pattern + r"$")


_PATTERNS = [(_compile_sentence(template), kinds) for template, kinds in SENTENCES]


@dataclass(frozen=True)
class Statement:
    """One statement of a summary: `summary[start:end] == text`; `kind` is "unparsed" for a
    sentence that states no known fact."""

    text: str
    start: int
    end: int
    kind: str


def find_statements(summary: str) -> list[Statement]:
    """Take a summary apart into statements, one per value."""
    return [statement for span in _split_sentences(summary) for statement in _parse(*span)]


def _split_sentences(summary: str) -> Iterator[tuple[str, int]]:
    start = 0
    for match in [*_SENTENCE_END.finditer(summary), None]:
        end = match.start() if match else len(summary)
        sentence = summary[start:end]
        if sentence.strip():
            yield sentence.strip(), start + len(sentence) - len(sentence.lstrip())
        start = match.end() if match else end


def _parse(sentence: str, offset: int) -> Iterator[Statement]:
    for pattern, kinds in _PATTERNS:
        match = pattern.match(sentence)
        if match:
            for kind in kinds:
                yield from _split_values(match.group(kind), offset + match.start(kind), kind)
            return
    yield Statement(sentence, offset, offset + len(sentence), "unparsed")


def _split_values(text: str, offset: int, kind: str) -> Iterator[Statement]:
    position = 0
    for value in text.split(" and ") if kind in _MULTIPLE else [text]:
        start = offset + position
        yield Statement(value, start, start + len(value), kind)
        position += len(value) + len(" and ")


def check(facts: dict, summary: str) -> list[dict]:
    """Judge every statement of `summary` against a note's fact table.

    `facts` maps a kind to the values the note states; the optional key "distractors" maps a kind to
    misleading values of the same kind. Returns dicts with text, start, end, kind, verdict
    (supported | contradicted | not_in_note), error_type (None where supported) and evidence: what
    the note states of that kind.
    """
    return [_judge(statement, facts) for statement in find_statements(summary)]


def _judge(statement: Statement, facts: dict) -> dict:
    stated = facts.get(statement.kind, [])
    if statement.text in stated:
        verdict, error_type = "supported", None
    else:
        verdict = "contradicted" if stated else "not_in_note"
        error_type = _name_error(statement, stated, facts)
    return {
        "text": statement.text,
        "start": statement.start,
        "end": statement.end,
        "kind": statement.kind,
        "verdict": verdict,
        "error_type": error_type,
        "evidence": "; ".join(stated),
    }


def _name_error(statement: Statement, stated: list[str], facts: dict) -> str:
    """Name the error: a misleading value taken over is contextual, a denied complaint is a
    negation, a near miss is a detail, the rest is made up."""
    misleading = facts.get("distractors", {}).get(statement.kind, [])
    if statement.kind == "unparsed":
        return "other"
    if any(value in statement.text for value in misleading):
        return "contextual"
    if statement.kind == "negatives" and statement.text in facts.get("complaint", []):
        return "negation"
    first_word = statement.text.split(" ")[0]
    is_near = any(first_word == value.split(" ")[0] for value in stated)
    single = statement.kind in ("age", "sex", "duration", "blood_pressure", "heart_rate")
    return "detail" if stated and (is_near or single) else "fabrication"


def find_omissions(facts: dict, summary: str) -> list[str]:
    """Return the kinds that the note states and the summary says nothing about, in note order."""
    said = {statement.kind for statement in find_statements(summary)}
    return [kind for kind in KINDS if kind in facts and kind not in said]
