"""The exact fact checker: every statement of a summary, held against what the note states.

It reads the fact table, never the note's wording, so it makes no judgement: a statement is
supported, contradicted, or not in the note. Types follow the taxonomy of the assessment.
"""

import re
from collections.abc import Iterator

from hallulib.clinic.notes import KINDS
from hallulib.clinic.summaries import SENTENCES

_MULTIPLE = {"history", "medications", "negatives"}
_SINGLE = {"age", "sex", "duration", "blood_pressure", "heart_rate"}


def _compile_sentence(template: str) -> re.Pattern[str]:
    pattern = re.escape(template.removesuffix("."))
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", pattern) + "$")


_PATTERNS = [_compile_sentence(template) for template in SENTENCES]


def check(facts: dict, summary: str) -> list[dict]:
    """Judge every statement of `summary` against a note's fact table.

    `facts` maps a kind to the values the note states; the optional key "distractors" maps a kind to
    misleading values of the same kind. Returns dicts with text, start, end, kind ("unparsed" where
    a sentence states no known fact), verdict (supported | contradicted | not_in_note), error_type
    (None where supported) and evidence: what the note states of that kind.
    """
    found = []
    for statement in _find_statements(summary):
        stated = facts.get(statement["kind"], [])
        verdict, error_type = "supported", None
        if statement["text"] not in stated:
            verdict = "contradicted" if stated else "not_in_note"
            error_type = _name_error(statement["text"], statement["kind"], facts)
        judged = {"verdict": verdict, "error_type": error_type, "evidence": "; ".join(stated)}
        found.append(statement | judged)
    return found


def _find_statements(summary: str) -> Iterator[dict]:
    """{text, start, end, kind} of each value, with `summary[start:end] == text`."""
    for sentence, offset in _split_sentences(summary):
        match = next(filter(None, (pattern.match(sentence) for pattern in _PATTERNS)), None)
        for kind in match.groupdict() if match else ["unparsed"]:
            text = match[kind] if match else sentence
            start = offset + (match.start(kind) if match else 0)
            for value in text.split(" and ") if kind in _MULTIPLE else [text]:
                yield {"text": value, "start": start, "end": start + len(value), "kind": kind}
                start += len(value) + len(" and ")


def _split_sentences(summary: str) -> Iterator[tuple[str, int]]:
    start = 0
    for piece in re.split(r"\.(?=\s|$)", summary):
        sentence = piece.strip()
        if sentence:
            yield sentence, start + piece.index(sentence)
        start += len(piece) + 1


def _name_error(text: str, kind: str, facts: dict) -> str:
    """Name the error: a misleading value taken over is contextual, a denied complaint is a
    negation, a near miss is a detail, the rest is made up."""
    stated = facts.get(kind, [])
    if kind == "unparsed":
        return "other"
    if any(value in text for value in facts.get("distractors", {}).get(kind, [])):
        return "contextual"
    if kind == "negatives" and text in facts.get("complaint", []):
        return "negation"
    is_near = text.split(" ")[0] in {value.split(" ")[0] for value in stated}
    return "detail" if stated and (is_near or kind in _SINGLE) else "fabrication"


def find_omissions(facts: dict, summary: str) -> list[str]:
    """Return the kinds that the note states and the summary says nothing about, in note order."""
    said = {statement["kind"] for statement in _find_statements(summary)}
    return [kind for kind in KINDS if kind in facts and kind not in said]
