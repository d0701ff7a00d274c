"""The evaluation on one page, as HTML and as Markdown from the same blocks.

Every figure is read from summary.json and the rows of the run. A red guardrail is red and says so
in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hallulib.evaluation.highlight import BOX, ItemChange, list_evidence, quote_item
from hallulib.evaluation.report import (
    GUARDRAIL_NAMES,
    describe_change,
    describe_rate,
    find_changed_items,
    format_p,
    headline_rows,
    percent,
    result_sentences,
    say_all,
)
from hallulib.files import write_text_atomic

SHOWN = {"fixed": 3, "broken": 3, "both_bad": 2}  # items of each kind that are shown in full
LISTED = 8  # ids named per kind; all of them are in evaluation.jsonl
KINDS = {
    "fixed": "fixed: hallucinated only before", "broken": "broken: hallucinated only after",
    "both_bad": "hallucinated under both", "both_good": "clean under both",
    "unanswered": "unanswered by one of them",
}  # fmt: skip
Block = tuple[str, Any]  # ("heading" | "list" | "table" | "status" | "item", content)


def write_pages(
    folder: Path,
    summary: dict[str, Any],
    records: Sequence[dict[str, Any]],
    generations: Sequence[dict[str, Any]],
) -> None:
    """Write report.html and report.md into `folder`; both are self-contained."""
    blocks = build_blocks(summary, records, generations)
    title = f"Evaluation of {summary['recipe']}"
    write_text_atomic(folder / "report.html", render_html(title, blocks))
    write_text_atomic(folder / "report.md", render_markdown(title, blocks))


def build_blocks(
    summary: dict[str, Any],
    records: Sequence[dict[str, Any]],
    generations: Sequence[dict[str, Any]],
) -> list[Block]:
    """The page's content, from the result to the single cases."""
    a, b = choose_shown(summary)
    blocks: list[Block] = [("status", describe_status(summary))]
    blocks += [("list", result_sentences(keep_comparison(summary, a, b)))]
    blocks += [("heading", "Rates, beside what they may cost")]
    blocks += [("table", headline_rows(summary))]
    blocks += [("list", [describe_measure(summary), *say_all(summary["all_systems"])])]
    blocks += [("heading", "The same items, before and after")]
    blocks += [("table", comparison_rows(summary)), ("heading", "Guardrails")]
    blocks.append(("table", guardrail_rows(summary)))
    if a:
        blocks.append(("heading", f"What changed from {a} to {b}"))
        blocks += show_changes(records, generations, a, b)
    if summary.get("texts"):
        blocks.append(("heading", "What the texts are like (this is not truth)"))
        blocks.append(("table", text_rows(summary["texts"])))
    return blocks


def describe_status(summary: dict[str, Any]) -> dict[str, Any]:
    """One line on the guardrails of the systems that were trained: {ok, text}."""
    red = [g for g in summary["guardrails"] if not g["ok"]]
    if not summary["guardrails"]:
        return {"ok": True, "text": "No guardrail was checked: fewer than two trained systems."}
    if not red:
        return {"ok": True, "text": "Guardrails: all held."}
    where = "; ".join(f"{GUARDRAIL_NAMES[g['name']]} ({g['a']} to {g['b']})" for g in red)
    return {"ok": False, "text": f"RED guardrails: {where}. Read the rates with them."}


def choose_shown(summary: dict[str, Any]) -> tuple[str, str]:
    """The comparison whose items are shown: SFT to DPO, else the last one; ("", "") without any."""
    pairs = [(c["a"], c["b"]) for c in summary["comparisons"]]
    return ("sft", "dpo") if ("sft", "dpo") in pairs else pairs[-1] if pairs else ("", "")


def keep_comparison(summary: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    """The summary as if only the systems a and b had been evaluated (all of it without a pair)."""
    if not a:
        return summary
    return summary | {
        "systems": {name: summary["systems"][name] for name in (a, b)},
        "all_systems": None,
        "comparisons": [c for c in summary["comparisons"] if (c["a"], c["b"]) == (a, b)],
    }


def comparison_rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """One row of text cells per comparison, with b and c."""
    rows = []
    for comparison in summary["comparisons"]:
        paired, names = comparison["paired"], f"{comparison['a']} to {comparison['b']}"
        if paired is None:
            rows.append({"systems": names, "items": "0 answered by both"})
            continue
        low, high = describe_change(paired["high"]), describe_change(paired["low"])
        rows.append({
            "systems": names,
            "items": f"{paired['n']} ({comparison['n_excluded']} left out)",
            "b: fixed": str(paired["b"]), "c: newly wrong": str(paired["c"]),
            "change in points (95 %)": f"{describe_change(paired['difference'])} "
                                       f"({low} to {high}, Bonett-Price)",
            "exact McNemar": format_p(paired["p_exact"]), "mid-p": format_p(paired["p_mid"]),
            "Holm": format_p(paired["p_holm"]),
        })  # fmt: skip
    return rows


def guardrail_rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """One row of text cells per comparison, one column per guardrail; each says held or RED."""
    rows: dict[str, dict[str, str]] = {}
    for g in summary["guardrails"]:
        names = f"{g['a']} to {g['b']}"
        row = rows.setdefault(names, {"systems": names})
        state = "held" if g["ok"] else "RED"
        column = f"{GUARDRAIL_NAMES[g['name']]} (at most {percent(g['limit'])} worse)"
        row[column] = f"{_show(g, g['before'])} to {_show(g, g['after'])}: {state}"
    return list(rows.values())


def _show(guardrail: dict[str, Any], value: float) -> str:
    return f"{value:.1f}" if guardrail["name"] == "mean_words" else percent(value)


def describe_measure(summary: dict[str, Any]) -> str:
    """What is counted, by whom, on how many items."""
    measured = (s["rates"][summary["primary"]] for s in summary["systems"].values())
    rate = next(filter(None, measured), None)
    how = f" (unit: {rate['unit']}, 95 % {rate['method']} interval)" if rate else ""
    return (
        f"Primary metric, declared before looking: {summary['primary']}{how}. Intervals of wrong "
        "statements and of what is left out: bootstrap over documents. "
        f"Detector: {summary['detector']}. {summary['n']} held-out items, the same for every "
        "system."
    )


def text_rows(texts: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """One row of text cells per system: overlap, perplexity, length, vocabulary."""
    rows = []
    for system, found in texts.items():
        row, words, used = {"system": system}, found["words"], found["vocabulary"]
        for name, rate in (found["overlap"] or {}).items():
            row[f"{name} with the reference"] = describe_rate(rate, counts=False)
        perplexity = found["perplexity"]
        row["perplexity of the reference"] = "not measured" if perplexity is None else (
            f"{perplexity['value']:.2f} ({perplexity['low']:.2f}-{perplexity['high']:.2f})"
        )  # fmt: skip
        row["token accuracy"] = describe_rate(found["token_accuracy"], counts=False)
        row["words: 5 %, median, 95 %"] = ", ".join(f"{words[q]:.0f}" for q in ("p5", "p50", "p95"))
        row["distinct words"] = str(used["distinct"])
        row["distinct in 50 words"] = "-" if used["mattr"] is None else percent(used["mattr"])
        rows.append(row)
    return rows


def show_changes(
    records: Sequence[dict[str, Any]], generations: Sequence[dict[str, Any]], a: str, b: str
) -> list[Block]:
    """Ids by what happened, then some items side by side."""
    found = find_changed_items(records, a, b)
    blocks: list[Block] = [("list", [_list_ids(kind, ids) for kind, ids in found.items()])]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (*generations, *records):
        key = (row["system"], row["id"])
        rows[key] = rows.get(key, {}) | row
    for kind, count in SHOWN.items():
        for item in found[kind][:count]:
            before, after = rows[a, item], rows[b, item]
            change = ItemChange(item, before["context"], before["reference"], before, after)
            blocks.append(("item", (KINDS[kind], change)))
    return blocks


def _list_ids(kind: str, ids: list[str]) -> str:
    line = f"{KINDS[kind]}: {len(ids)}"
    if not ids or kind not in SHOWN:
        return line
    return f"{line} ({', '.join(ids[:LISTED])}{', ...' if len(ids) > LISTED else ''})"


def render_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""
    parts = [f"# {title}"]
    for kind, content in blocks:
        if kind == "heading":
            parts.append(f"## {content}")
        elif kind == "list":
            parts.append("\n".join(f"- {_escape_markdown(line)}" for line in content))
        elif kind == "status":
            parts.append(f"**{content['text']}**")
        elif kind == "table":
            parts.append(_table_markdown(content))
        else:
            label, change = content
            parts.append(f"### {change.item_id}, {label}")
            parts.append("> " + quote_item(change).replace("\n", "\n> "))
    return "\n\n".join(parts) + "\n"


def _table_markdown(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return "None."
    names = list(max(rows, key=len))
    lines = [names, ["---"] * len(names)]
    lines += [[_escape_markdown(row.get(name, "-")) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escape_markdown(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML page: no script, nothing fetched."""
    parts = [f"<h1>{escape(title)}</h1>"]
    for kind, content in blocks:
        if kind == "heading":
            parts.append(f"<h2>{escape(content)}</h2>")
        elif kind == "list":
            parts.append("<ul>" + "".join(f"<li>{escape(x)}</li>" for x in content) + "</ul>")
        elif kind == "status":
            style = "held" if content["ok"] else "red"
            parts.append(f'<p class="{style}" role="status">{escape(content["text"])}</p>')
        elif kind == "table":
            parts.append(_table_html(content))
        else:
            label, change = content
            summary = f"{escape(change.item_id)}: {escape(label)}"
            evidence = "".join(f"<td>{list_evidence(change, s)}</td>" for s in change.sides)
            is_open = " open" * (not any("<details" in part for part in parts))
            parts.append(
                f"<details{is_open}><summary>{summary}</summary>{change._repr_html_()}"
                f'<table class="sides"><tr>{evidence}</tr></table></details>'
            )
    return _PAGE.format(title=escape(title), box=BOX, body="\n".join(parts))


def _table_html(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return "<p>None.</p>"
    names = list(max(rows, key=len))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f"<tr>{''.join(_cell_html(row.get(name, '-')) for name in names)}</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell_html(text: str) -> str:
    style = ' class="red"' if text.endswith("RED") else ""
    return f"<td{style}>{escape(text)}</td>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #111; background: #fff }}
table {{ border-collapse: collapse }} .wide {{ overflow-x: auto }}
td, th {{ padding: .2rem .7rem; border-bottom: 1px solid #ccc; text-align: left;
  vertical-align: top }}
.red {{ background: #b3261e; color: #fff; font-weight: bold; padding: .2rem .7rem }}
.held {{ background: #e6f4ea; padding: .2rem .7rem }}
summary {{ cursor: pointer; font-weight: bold; margin: 1rem 0 .3rem }}
.sides {{ width: 100%; table-layout: fixed }}
</style></head><body>
{body}
</body></html>
"""
