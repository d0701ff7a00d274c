"""Text with its statements marked, as HTML for notebooks and reports.

Every mark carries a label and an underline of its own beside the colour, so that it can be read in
black and white; all text is escaped, because clinical text is full of `<` and `&`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from hallulib.detectors.base import ERROR_VERDICTS
from hallulib.detectors.tokens import find_sentences
from hallulib.errors import DataError
from hallulib.run import Run

# verdict -> (label, text-decoration, background); backgrounds keep dark text at 7:1 and more
_MARKS = {
    "supported": ("", "underline solid #1b7837 2px", "#e6f4ea"),
    "contradicted": ("contradicted", "underline wavy #b2182b 2px", "#fde0dd"),
    "not_in_note": ("not in the note", "underline dashed #b35806 2px", "#fdebd0"),
    "unparsed": ("unreadable", "underline dotted #555555 2px", "#eeeeee"),
}
_FACT_MARK = "underline solid #2166ac 2px"
BOX = "font-family:sans-serif;line-height:1.9;color:#111;background:#fff;padding:8px"


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
        label, line, colour = _MARKS[s["verdict"]]
        title = f"{s['kind']}: {s['verdict']}. {s.get('evidence') or ''}".strip()
        spans.append((s["start"], s["end"], label, line, colour, title))
    return _mark(text, spans)


def highlight_facts(text: str, facts: Mapping[str, Any]) -> str:
    """HTML of a note with the values of its facts (kind -> values) marked where they stand.

    A value may be worded otherwise in the note; then it is not marked. Distractors are marked as
    what they are.
    """
    spans = []
    misleading = facts.get("distractors", {})
    for kind, values in [*misleading.items(), *facts.items()]:
        if kind == "distractors":
            continue
        is_misleading = values is misleading.get(kind)
        line, colour = (_MARKS["unparsed"][1:]) if is_misleading else (_FACT_MARK, "#e3eefa")
        label = f"{kind}, not now" if is_misleading else kind
        for value in values:
            for match in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE):
                spans.append((*match.span(), label.replace("_", " "), line, colour, label))
                break
    return _mark(text, spans)


def _mark(text: str, spans: Sequence[tuple[int, int, str, str, str, str]]) -> str:
    parts, upto = [], 0
    for start, end, label, line, colour, title in sorted(spans, key=lambda s: (s[0], -s[1])):
        if start < upto:
            continue
        tag = f'<sub style="color:#333"> [{escape(label)}]</sub>' if label else ""
        parts.append(escape(text[upto:start]))
        parts.append(
            f'<mark style="background:{colour};color:#111;text-decoration:{line}" '
            f'title="{escape(title)}">{escape(text[start:end])}</mark>{tag}'
        )
        upto = end
    body = "".join(parts) + escape(text[upto:])
    return f'<div style="{BOX}">{body.replace(chr(10), "<br>")}</div>'


@dataclass(frozen=True)
class ItemChange:
    """One held-out item under two systems; shows itself in a notebook."""

    item_id: str
    context: str
    reference: str
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def sides(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both systems' rows: the text with its verdicts."""
        return self.before, self.after

    def _repr_html_(self) -> str:
        columns = "".join(map(_render_side, self.sides))
        return (
            f'<div style="{BOX}"><b>{escape(self.item_id)}</b>, the note:<br>'
            f'{escape(self.context).replace(chr(10), "<br>")}</div>'
            f'<table style="width:100%"><tr>{columns}</tr></table>'
        )

    def __str__(self) -> str:
        return f"{self.item_id}\nnote: {self.context}\n" + "\n".join(
            f"{side['system']} ({_say_verdict(side)}): {side['text']}" for side in self.sides
        )


def _render_side(side: Mapping[str, Any]) -> str:
    return (
        '<td style="vertical-align:top;text-align:left;width:50%">'
        f"<b>{escape(side['system'])}</b>: {escape(_say_verdict(side))}"
        f"{highlight_statements(side['text'], side['statements'])}{_list_omissions(side)}</td>"
    )


def _find_wrong(side: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [s for s in side["statements"] if s["verdict"] in ERROR_VERDICTS]


def quote_evidence(context: str, statement: Mapping[str, Any]) -> list[str]:
    """The sentences of the note in which a statement's evidence stands; [] if there is none."""
    spans = [tuple(span) for span in statement.get("evidence_spans", ())]
    return [
        context[start:end]
        for start, end in find_sentences(context)
        if any(start < stop and begin < end for begin, stop in spans)
    ]


def list_evidence(change: ItemChange, side: Mapping[str, Any]) -> str:
    """HTML: each unsupported statement of one side, and what the note says on it."""
    lines = [
        f"<li><b>{escape(s['text'])}</b> ({escape(s['verdict'].replace('_', ' '))}): "
        f"{escape(_say_evidence(change.context, s))}</li>"
        for s in _find_wrong(side)
    ]
    return f"<ul>{''.join(lines)}</ul>" if lines else "<i>nothing unsupported</i>"


def _say_evidence(context: str, statement: Mapping[str, Any]) -> str:
    quotes = quote_evidence(context, statement)
    if quotes:
        return "the note has " + " / ".join(f'"{quote}"' for quote in quotes)
    return statement.get("evidence") or "the note says nothing on it"


def quote_item(change: ItemChange) -> str:
    """The item as Markdown: the note, and each side with its unsupported statements in bold."""
    lines = [f"note: {escape(change.context, quote=False)}"]
    for side in change.sides:
        text, upto = "", 0
        for s in sorted(_find_wrong(side), key=lambda s: s["start"]):
            if s["start"] >= upto:
                text += escape(side["text"][upto : s["start"]], quote=False)
                text += f"**{escape(s['text'], quote=False)}** [{s['verdict'].replace('_', ' ')}]"
                upto = s["end"]
        text += escape(side["text"][upto:], quote=False)
        lines.append(f"**{side['system']}**: {text or '(empty)'}")
        lines += [
            f"- {escape(s['text'], quote=False)}: "
            f"{escape(_say_evidence(change.context, s), quote=False)}"
            for s in _find_wrong(side)
        ]
    return "\n\n".join(lines)


def _say_verdict(side: Mapping[str, Any]) -> str:
    wrong = _find_wrong(side)
    if side["hallucinated"] is None:
        return "nothing could be read"
    if wrong:
        return f"{len(wrong)} wrong: " + "; ".join(s["text"] for s in wrong)
    return "every statement is in the note"


def _list_omissions(side: Mapping[str, Any]) -> str:
    return f"<i>left out: {escape(', '.join(side['omissions']))}</i>" if side["omissions"] else ""


def change_on_item(run: Run, item_id: str, before: str = "sft", after: str = "dpo") -> ItemChange:
    """What two systems wrote on one held-out item, side by side with their verdicts.

    Raises DataError for an id or system that was not evaluated, MissingArtifact before notebook 06.
    """
    sides = {}
    for name in ("generations", "evaluation"):
        path = run.require(f"evaluation/{name}.jsonl")
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            if row["id"] == item_id:
                sides[row["system"]] = sides.get(row["system"], {}) | row
    missing = [system for system in (before, after) if system not in sides]
    if missing:
        raise DataError(
            f"item {item_id!r} was not evaluated under {missing[0]!r}",
            "choose an id of evaluation.jsonl; find_changed_items lists them by what changed",
        )
    first = sides[before]
    return ItemChange(
        item_id, first["context"], first["reference"], sides[before], sides[after]
    )
