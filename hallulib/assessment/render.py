"""The HTML of the widget and of its static picture. Every text from data is escaped here."""

from __future__ import annotations

from html import escape

from hallulib.assessment.queue import Entry
from hallulib.assessment.session import AssessmentSession
from hallulib.assessment.state import EntryState

VERDICT_TEXTS = {
    "supported": "✓ Supported",
    "hallucinated": "✗ Hallucinated",
    "unsure": "? Unsure",
}
PREFERENCE_TEXTS = {
    -2: "⇐ 1 much better",
    -1: "← 1 better",
    0: "= no difference",
    1: "2 better →",
    2: "2 much better ⇒",
}

# JupyterLab's own variables, so that light and dark themes both work; the second value serves where
# there is no JupyterLab. Colour never carries meaning alone: every state is also in words.
CSS = """
.hlw, .hlw * { box-sizing: border-box; }
.hlw { width: 100%; padding: 12px; border: 1px solid var(--jp-border-color1, #767676);
  border-radius: 6px; background: var(--jp-layout-color1, #fff);
  color: var(--jp-ui-font-color1, #1b1b1b); font-family: var(--jp-ui-font-family, sans-serif);
  font-size: 14px; line-height: 1.5; }
.hlw:focus-visible, .hlw button:focus-visible, .hlw .hlw-pane:focus-visible,
.hlw input:focus-visible, .hlw select:focus-visible {
  outline: 3px solid var(--jp-brand-color1, #0b57d0); outline-offset: 2px; }
.hlw .widget-html, .hlw .jupyter-widget-html { width: auto; height: auto; margin: 0; }
.hlw .widget-html-content { line-height: 1.5; font-size: 14px; overflow: visible; }
.hlw-head { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: baseline; }
.hlw-head b { font-size: 16px; }
.hlw-saved { margin-left: auto; }
.hlw-bar { height: 8px; margin: 6px 0 10px; border-radius: 4px; overflow: hidden;
  border: 1px solid var(--jp-border-color1, #767676); background: var(--jp-layout-color2, #eee); }
.hlw-bar div { height: 100%; background: var(--jp-brand-color1, #0b57d0); }
.hlw-panes { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr);
  gap: 12px; margin-bottom: 8px; }
.hlw-panes > div { display: flex; flex-direction: column; }
.hlw-pane { flex: 1 1 auto; border: 1px solid var(--jp-border-color2, #bdbdbd); border-radius: 4px;
  padding: 8px 12px; max-height: 42vh; min-height: 9em; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--jp-layout-color0, #fff);
  color: var(--jp-content-font-color1, #1b1b1b);
  font-size: 15px; font-family: var(--jp-content-font-family, sans-serif); }
.hlw h4 { margin: 0 0 4px; font-size: 13px; font-weight: 600; color: inherit; }
.hlw-empty { font-style: italic; }
.hlw-note { border-left: 4px solid currentColor; padding: 2px 8px; margin: 6px 0; }
.hlw-alert { border: 2px solid var(--jp-error-color1, #b3261e); padding: 4px 8px; margin: 6px 0;
  border-radius: 4px; }
.hlw button.jupyter-button, .hlw .hlw-button { width: auto; height: auto; min-height: 32px;
  padding: 4px 14px; margin: 2px 4px 2px 0; font-size: 14px; line-height: 1.5;
  border: 1px solid var(--jp-border-color0, #767676); border-radius: 4px; box-shadow: none;
  background: var(--jp-layout-color2, #eee); color: var(--jp-ui-font-color0, #000); }
.hlw button.jupyter-button:hover:enabled { background: var(--jp-layout-color3, #ddd); }
.hlw button.hlw-main, .hlw .hlw-button.hlw-main { border-width: 2px; font-weight: 600; }
.hlw button.jupyter-button[disabled] { opacity: 1; font-style: italic; border-style: dashed;
  color: var(--jp-ui-font-color1, #1b1b1b); }
.hlw-sentence { align-items: center; border-top: 1px solid var(--jp-border-color2, #bdbdbd); }
@media (max-width: 700px) { .hlw-panes { grid-auto-flow: row; } .hlw-pane { max-height: 30vh; } }
"""


def render_style() -> str:
    """The style sheet as an HTML element."""
    return f"<style>{CSS}</style>"


def render_head(session: AssessmentSession) -> str:
    """Where the assessor is, how much is left, and that all of it is saved."""
    progress = session.progress
    entry = session.current
    place = "Finished" if entry is None else f"Item {entry.order_index + 1} of {progress.total}"
    parts = [f"<b>{place}</b>", f"<span>{progress.graded} graded</span>"]
    if progress.skipped:
        parts.append(f"<span>{progress.skipped} skipped</span>")
    if progress.flagged:
        parts.append(f"<span>{progress.flagged} flagged</span>")
    if progress.remaining_seconds:
        parts.append(f"<span>about {_duration(progress.remaining_seconds)} left</span>")
    who = escape(session.header.assessor_id)
    if session.header.assessor_kind == "simulated":
        who = "SIMULATED assessor (a script, not a person)"
    parts.append(f"<span>Assessor: {who}</span>")
    events = "1 event" if session.saved_events == 1 else f"{session.saved_events} events"
    parts.append(f'<span class="hlw-saved">✓ Saved ({events} on disk)</span>')
    share = 100 * progress.graded / progress.total if progress.total else 0
    bar = (
        f'<div class="hlw-bar" role="progressbar" aria-label="Items graded" aria-valuemin="0" '
        f'aria-valuemax="{progress.total}" aria-valuenow="{progress.graded}">'
        f'<div style="width:{share:.1f}%"></div></div>'
    )
    return f'<div class="hlw-head">{"".join(parts)}</div>{bar}'


def render_panes(entry: Entry | None) -> str:
    """Source and summary (or both summaries) side by side."""
    if entry is None:
        return '<div class="hlw-pane">Every item is graded or skipped. Thank you.</div>'
    titles = ["Summary"] if len(entry.summaries) == 1 else ["Summary 1", "Summary 2"]
    panes = [_pane("Source note", entry.source)]
    panes += [_pane(title, text) for title, text in zip(titles, entry.summaries, strict=True)]
    return f'<div class="hlw-panes">{"".join(panes)}</div>'


def render_answer(state: EntryState | None) -> str:
    """What has already been said about the item that is shown, in words."""
    if state is None:
        return ""
    said = [f"Graded: {VERDICT_TEXTS[grade.verdict]}" for _, grade in sorted(state.grades.items())]
    if state.preference is not None:
        said.append(f"Preferred: {PREFERENCE_TEXTS[state.preference.preference]}")
    if state.skipped:
        said.append("Skipped")
    if state.flagged:
        said.append("⚑ Flagged")
    return f'<div class="hlw-note">{escape(" · ".join(said))}</div>' if said else ""


def render_message(text: str, is_alert: bool = False) -> str:
    """A line that a screen reader speaks: politely, or at once when something was not saved."""
    role, css = ("alert", "hlw-alert") if is_alert else ("status", "hlw-status")
    live = "assertive" if is_alert else "polite"
    return f'<div role="{role}" aria-live="{live}" class="{css}">{escape(text)}</div>'


def render_static(session: AssessmentSession, labels: list[str]) -> str:
    """A picture of the widget as it is now, for executed notebooks, with these button labels."""
    buttons = "".join(
        f'<span class="hlw-button" style="display:inline-block">{escape(text)}</span>'
        for text in labels
    )
    return (
        f'{render_style()}<div class="hlw hlw-static" role="group" '
        f'aria-label="Static picture of the assessment widget">'
        f"{render_head(session)}{render_panes(session.current)}"
        f'{render_answer(session.current_state)}<div style="margin-top:8px">{buttons}</div>'
        "<div><i>A static picture. Run this notebook in JupyterLab to grade.</i></div></div>"
    )


def _pane(title: str, text: str) -> str:
    body = escape(text) if text.strip() else '<span class="hlw-empty">(empty)</span>'
    label = escape(title)
    return (
        f'<div><h4>{label}</h4><div class="hlw-pane" tabindex="0" role="region" '
        f'aria-label="{label}">{body}</div></div>'
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
