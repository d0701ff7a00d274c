"""Text with its statements marked, as HTML for notebooks and reports.

Every mark carries a label and an underline of its own beside the colour, so that it can be read in
black and white; all text is escaped, because clinical text is full of `<` and `&`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hallulib.errors import DataError

# verdict -> (label, text-decoration, background); backgrounds keep dark text at 7:1 and more
_MARKS = {
    "supported": ("", "underline solid #1b7837 2px", "#e6f4ea"),
    "contradicted": (" [contradicted]", "underline wavy #b2182b 2px", "#fde0dd"),
    "not_in_note": (" [not in the note]", "underline dashed #b35806 2px", "#fdebd0"),
    "unparsed": (" [unreadable]", "underline dotted #555555 2px", "#eeeeee"),
}
_BOX = (
    "font-family:sans-serif;line-height:1.9;color:#111;background:#fff;padding:8px;"
    "white-space:pre-line"
)


def highlight_statements(text: str, statements: Sequence[Mapping[str, Any]]) -> str:
    """HTML of a text with each statement marked by its verdict (dicts of evaluation.jsonl).

    Marks that overlap an earlier one are left out. Raises DataError if a span is not in the text.
    """
    parts, upto = [], 0
    for s in sorted(statements, key=lambda s: (s["start"], -s["end"])):
        if text[s["start"] : s["end"]] != s["text"]:
            raise DataError(
                f"the statement {s['text']!r} is not at {s['start']}-{s['end']} of its text",
                "run notebook 06_evaluation again: the verdicts belong to another summary",
            )
        if s["start"] < upto:
            continue
        label, line, colour = _MARKS[s["verdict"]]
        title = escape(f"{s['kind']}: {s['verdict']}. {s.get('evidence') or ''}".strip())
        style = f"background:{colour};color:#111;text-decoration:{line}"
        parts.append(escape(text[upto : s["start"]]))
        parts.append(f'<mark style="{style}" title="{title}">{escape(s["text"])}</mark>')
        parts.append(f'<sub style="color:#333">{label}</sub>' if label else "")
        upto = s["end"]
    return f'<div style="{_BOX}">{"".join(parts)}{escape(text[upto:])}</div>'
