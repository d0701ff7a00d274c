"""Text with its statements marked, as HTML for notebooks and reports.

Every mark carries a label and an underline of its own beside the colour, so that it can be read in
black and white; all text is escaped, because clinical text is full of `<` and `&`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hallulib.errors import DataError

# verdict -> (label, text-decoration, background); backgrounds keep dark text at 7:1 and more
_MARKS = {
    "supported": ("", "underline solid #1b7837 2px", "#e6f4ea"),
    "contradicted": ("contradicted", "underline wavy #b2182b 2px", "#fde0dd"),
    "not_in_note": ("not in the note", "underline dashed #b35806 2px", "#fdebd0"),
    "unparsed": ("unreadable", "underline dotted #555555 2px", "#eeeeee"),
}
_FACT = ("underline solid #2166ac 2px", "#e3eefa")
_DISTRACTOR = _MARKS["unparsed"][1:]
_BOX = (
    "font-family:sans-serif;line-height:1.9;color:#111;background:#fff;padding:8px;"
    "white-space:pre-line"
)


def highlight_statements(text: str, statements: Sequence[Mapping[str, Any]]) -> str:
    """HTML of a summary with each statement marked by its verdict (dicts of evaluation.jsonl).

    Marks that overlap an earlier one are left out. Raises DataError if a span is not in the text.
    """
    spans = []
    for s in statements:
        if text[s["start"] : s["end"]] != s["text"]:
            raise DataError(
                f"the statement {s['text']!r} is not at {s['start']}-{s['end']} of its text",
                "run notebook 06_evaluation again: the verdicts belong to another summary",
            )
        label, *style = _MARKS[s["verdict"]]
        title = f"{s['kind']}: {s['verdict']}. {s.get('evidence') or ''}".strip()
        spans.append((s["start"], s["end"], label, title, *style))
    return _mark(text, spans)


def highlight_facts(text: str, facts: Mapping[str, Any]) -> str:
    """HTML of a note with the values of its facts (kind -> values) marked where they stand.

    A value may be worded otherwise in the note; then it is not marked. Distractors are marked as
    what they are.
    """
    stated = {kind: values for kind, values in facts.items() if kind != "distractors"}
    spans = []
    for found, ending, style in (
        (facts.get("distractors", {}), ", not now", _DISTRACTOR), (stated, "", _FACT)
    ):  # fmt: skip
        for kind, values in found.items():
            label = kind.replace("_", " ") + ending
            for value in values:
                match = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE)
                spans += [(*match.span(), label, label, *style)] if match else []
    return _mark(text, spans)


def _mark(text: str, spans: Sequence[tuple[int, int, str, str, str, str]]) -> str:
    parts, upto = [], 0
    for start, end, label, title, line, colour in sorted(spans, key=lambda s: (s[0], -s[1])):
        if start < upto:
            continue
        parts.append(escape(text[upto:start]))
        parts.append(
            f'<mark style="background:{colour};color:#111;text-decoration:{line}" '
            f'title="{escape(title)}">{escape(text[start:end])}</mark>'
        )
        parts.append(f'<sub style="color:#333"> [{escape(label)}]</sub>' if label else "")
        upto = end
    return f'<div style="{_BOX}">{"".join(parts)}{escape(text[upto:])}</div>'
