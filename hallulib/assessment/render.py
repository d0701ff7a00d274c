"""The HTML of the widget and of its static picture. Every text from data is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from hallulib.assessment.events import SIMULATED, Event, SentenceGrade
from hallulib.assessment.highlight import mark_terms
from hallulib.assessment.queue import Sentence
from hallulib.assessment.session import AssessmentSession
from hallulib.assessment.state import EntryState

VERDICT_TEXTS = {
    "supported": "✓ Supported",
    "hallucinated": "✗ Hallucinated",
    "unsure": "? Unsure",
    "general_knowledge": "✚ General knowledge",
}
PREFERENCE_TEXTS = {
    -2: "⇐ 1 much better",
    -1: "← 1 better",
    0: "= no difference",
    1: "2 better →",
    2: "2 much better ⇒",
}
KEY_NAMES = {"Enter": "⏎ Enter", "ArrowUp": "↑", "ArrowDown": "↓"}


@dataclass
class Button:
    """One thing the assessor can do. `why_not` says why it cannot be done now, "" when it can;
    `focus` names a text field that it leads to instead of doing something."""

    name: str
    text: str
    key: str
    hint: str
    do: Callable[[], Any]
    press: Callable[[str], None]
    is_main: bool = False
    focus: str = ""
    pressed: bool | None = None
    why_not: str = ""
    is_shown: bool = True

    def click(self) -> None:
        """What a click in the browser does."""
        self.press(self.name)


@dataclass(frozen=True)
class Opinion:
    """What an assessor said of an entry, under a letter instead of a name; for adjudication."""

    label: str
    event: Event


@dataclass(frozen=True)
class Picture:
    """All that the view shows at one moment."""

    session: AssessmentSession
    buttons: dict[str, Button]
    selected: str = ""
    quick: bool = False
    suggestions: dict[str, str] | None = None
    opinions: Sequence[Opinion] = ()
    is_static: bool = False


@cache
def read_asset(name: str) -> str:
    """widget.js or widget.css."""
    return Path(__file__).with_name(name).read_text("utf-8")


def render_regions(picture: Picture) -> dict[str, str]:
    """The four parts of the widget, each as HTML."""
    return {
        "head": render_head(picture.session),
        "panes": render_panes(picture),
        "work": render_work(picture),
        "foot": render_foot(picture),
    }


def render_static(picture: Picture) -> str:
    """A picture of the widget as it is now, without scripts, for executed notebooks."""
    parts = "".join(render_regions(picture).values())
    return (
        f'<style>{read_asset("widget.css")}</style><div class="hlw hlw-static" role="group" '
        f'aria-label="Static picture of the assessment widget">{parts}'
        '<div role="status">A static picture. Run this notebook in JupyterLab, or '
        "<code>make assess</code>, to grade.</div></div>"
    )


def render_head(session: AssessmentSession) -> str:
    """Where the assessor is, how much is left, and that all of it is saved."""
    progress, entry = session.progress, session.current
    place = "Finished" if entry is None else f"Item {entry.order_index + 1} of {progress.total}"
    parts = [f"<b>{place}</b>", f"<span>{progress.graded} graded</span>"]
    if progress.skipped:
        parts.append(f"<span>{progress.skipped} skipped</span>")
    if progress.flagged:
        parts.append(f"<span>{progress.flagged} flagged</span>")
    if progress.remaining_seconds:
        parts.append(f"<span>about {_duration(progress.remaining_seconds)} left</span>")
    if session.header.assessor_kind == SIMULATED:
        parts.append('<span class="hlw-simulated">SIMULATED assessor: a script, no person</span>')
    else:
        parts.append(f"<span>Assessor: {escape(session.header.assessor_id)}</span>")
    events = "1 event" if session.saved_events == 1 else f"{session.saved_events} events"
    parts.append(
        '<span class="hlw-right"><span class="hlw-keys-on">⌨ keys on</span>'
        '<span class="hlw-keys-off">⌨ click here to use keys</span><span class="hlw-saved">'
        f'<span class="hlw-done">✓ Saved ({events} on disk)</span>'
        '<span class="hlw-wait">… saving</span></span></span>'
    )
    share = 100 * progress.graded / progress.total if progress.total else 0
    return (
        f'<div class="hlw-head">{"".join(parts)}</div>'
        f'<div class="hlw-bar" role="progressbar" aria-label="Items graded" aria-valuemin="0" '
        f'aria-valuemax="{progress.total}" aria-valuenow="{progress.graded}">'
        f'<div style="width:{share:.1f}%"></div></div>'
    )


def render_panes(picture: Picture) -> str:
    """Source and summary (or both summaries) side by side."""
    entry, state = picture.session.current, picture.session.current_state
    if entry is None:
        return "<p>Every item is graded or skipped. Thank you.</p>"
    if picture.session.mode == "ab":
        texts = [("Summary 1", entry.summaries[0]), ("Summary 2", entry.summaries[1])]
        panes = [
            _pane("Source note", escape(entry.source)),
            *(_pane(t, escape(x)) for t, x in texts),
        ]
    elif picture.quick or not entry.sentences():
        panes = [
            _pane("Source note", escape(entry.source)),
            _pane("Summary", escape(entry.summaries[0])),
        ]
    else:
        sentences = entry.sentences()
        chosen = next((s.text for s in sentences if s.statement_id == picture.selected), "")
        rows = "".join(_sentence(s, state, picture) for s in sentences)
        panes = [
            _pane(
                "Source note (words of the chosen sentence are marked)",
                mark_terms(entry.source, chosen),
            ),
            _pane("Summary, sentence by sentence", rows, "hlw-list"),
        ]
    return f'<div class="hlw-panes">{"".join(panes)}</div>'


def render_work(picture: Picture) -> str:
    """What has been said about the item, what others said of it, and the buttons to answer with."""
    state = picture.session.current_state
    if picture.session.mode == "ab":
        return _said(state) + _row("Which is better?", picture, "prefer_")
    name = (
        "Whole summary" if picture.quick or not picture.selected else f"Sentence {picture.selected}"
    )
    rows = [_said(state), *map(_opinion, picture.opinions), _row(name, picture, "verdict_")]
    return "".join(
        [*rows, _row("Error type", picture, "type_"), _row("Severity", picture, "severity_")]
    )


def render_foot(picture: Picture) -> str:
    """Going on, and what can be written down."""
    state = picture.session.current_state
    fields = [_field("note", "Note", state.note if state else "", picture)]
    if picture.session.mode == "single":
        omissions = "; ".join(o.text for o in state.omissions) if state else ""
        fields.append(_field("omissions", "Left out of the summary", omissions, picture))
    return f'{_row("", picture, "go_")}<div class="hlw-fields">{"".join(fields)}</div>'


def describe_label(label: SentenceGrade) -> str:
    """A sentence's grade in words."""
    said = [VERDICT_TEXTS[label.verdict], label.type, label.severity]
    return " · ".join(part for part in said if part)


def _sentence(sentence: Sentence, state: EntryState | None, picture: Picture) -> str:
    sid, label = sentence.statement_id, state.labels.get(sentence.statement_id) if state else None
    said = [describe_label(label) if label else "<i>not graded yet</i>"]
    if picture.suggestions is not None:
        said.append(f"<i>detector: {escape(picture.suggestions.get(sid, 'no objection'))}</i>")
    for opinion in picture.opinions:
        given = [g for g in opinion.event.labels if g.statement_id == sid]
        said += [f"<i>{escape(opinion.label)}: {describe_label(g)}</i>" for g in given]
    current = sid == picture.selected
    tag, attributes = (
        "button",
        f'type="button" data-act="sentence:{sid}" tabindex="{0 if current else -1}"',
    )
    if picture.is_static:
        tag, attributes = "div", ""
    return (
        f'<{tag} {attributes} class="hlw-s hlw-{label.verdict if label else "open"}" '
        f'aria-current="{str(current).lower()}"><b>{sid}</b><span>{escape(sentence.text)}'
        f'<span class="hlw-said">{" · ".join(said)}</span></span></{tag}>'
    )


def _said(state: EntryState | None) -> str:
    if state is None:
        return ""
    said = [f"Graded: {VERDICT_TEXTS[grade.verdict]}" for _, grade in sorted(state.grades.items())]
    if state.preference is not None:
        said.append(f"Preferred: {PREFERENCE_TEXTS[state.preference.preference]}")
    said += ["Skipped"] * state.skipped + ["⚑ Flagged"] * state.flagged
    return f'<div class="hlw-peers">{escape(" · ".join(said))}</div>' if said else ""


def _opinion(opinion: Opinion) -> str:
    event = opinion.event
    said = [f"{opinion.label}: {VERDICT_TEXTS[event.verdict]}"] + [event.note] * bool(event.note)
    return f'<div class="hlw-peers">{escape(" · ".join(said))}</div>'


def _row(name: str, picture: Picture, prefix: str) -> str:
    own = [b for n, b in picture.buttons.items() if n.startswith(prefix) and b.is_shown]
    if not own:
        return ""
    title = f'<span class="hlw-name">{escape(name)}</span>' if name else ""
    buttons = "".join(_button(b, picture.is_static) for b in own)
    label = escape(name or "Go on")
    return f'<div class="hlw-row" role="group" aria-label="{label}">{title}{buttons}</div>'


def _button(button: Button, is_static: bool = False) -> str:
    key = f" <kbd>{escape(KEY_NAMES.get(button.key, button.key))}</kbd>" if button.key else ""
    css = "hlw-b hlw-main" if button.is_main else "hlw-b"
    if is_static:
        return f'<span class="{css}">{escape(button.text)}{key}</span>'
    attributes = [f'data-act="{button.name}"', f'title="{escape(button.why_not or button.hint)}"']
    if button.key:
        attributes.append(f'aria-keyshortcuts="{escape(button.key)}"')
    if button.focus:
        attributes.append(f'data-focus="{button.focus}"')
    if button.pressed is not None:
        attributes.append(f'aria-pressed="{str(button.pressed).lower()}"')
    if button.why_not:
        attributes.append('aria-disabled="true"')
    start = f'<button type="button" class="{css}" {" ".join(attributes)}>'
    return f"{start}{escape(button.text)}{key}</button>"


def _field(name: str, label: str, value: str, picture: Picture) -> str:
    buttons, text = picture.buttons, escape(value)
    after = buttons.get(f"after_{name}")
    box = f'<input name="{name}" aria-label="{label}" value="{text}" autocomplete="off">'
    parts = [_button(buttons[name], picture.is_static)]
    parts.append(f"<span>{text}</span>" if picture.is_static else box)
    parts += [_button(after, picture.is_static)] if after else []
    return f'<div class="hlw-field">{"".join(parts)}</div>'


def _pane(title: str, body: str, css: str = "") -> str:
    label = escape(title)
    body = body if body.strip() else '<span class="hlw-empty">(empty)</span>'
    return (
        f'<div><div class="hlw-title">{label}</div><div class="hlw-pane {css}" tabindex="0" '
        f'role="region" aria-label="{label}" data-scroll="{label}">{body}</div></div>'
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
