"""The evaluation in words and table cells; every number is read from summary.json.

What a page or a sentence says stands in a template; all text in HTML is escaped.
"""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader

from hallulib.evaluation.metrics import PRIMARY
from hallulib.rates import Rate, format_p, percent, rate

GUARDRAIL_NAMES = {
    "omission_rate": "left out of what should be said",
    "answer_rate": "summaries with an answer",
    "unparsed_statement_rate": "statements nobody can read",
    "mean_words": "words per summary",
}


@cache
def load_templates() -> Environment:
    """The room's templates, with the house's ways to write a number as filters."""
    templates = Environment(
        loader=PackageLoader("hallulib.evaluation", ""), keep_trailing_newline=True,
        autoescape=lambda name: name.endswith(".html.j2"), trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = (format_p, percent, show_rate, show_change, show_guarded)
    templates.filters |= {function.__name__: function for function in shown}
    templates.globals["names"] = GUARDRAIL_NAMES
    return templates


def show_rate(found: dict[str, Any] | None) -> str:
    """A rate of summary.json as '6 of 10 summaries (60 %, 31-83 %)'; 'not measured' for None."""
    return str(Rate(**found)) if found else "not measured"


def show_change(paired: dict[str, Any]) -> str:
    """The fall of a rate as its change: "-57.5 points (95 %: -62.3 to -51.9)"."""
    bounds = (paired["difference"], paired["high"], paired["low"])
    value, low, high = (f"{round(-100 * fall, 1) + 0.0:+.1f}" for fall in bounds)
    return f"{value} points (95 %: {low} to {high})"


def show_guarded(entry: dict[str, Any]) -> str:
    """Both values of a guardrail in its unit: "0 % to 67 %", "21.3 to 18.0"."""
    before, after = entry["before"], entry["after"]
    if entry["name"] == "mean_words":
        return f"{before:.1f} to {after:.1f}"
    return f"{percent(before)} % to {percent(after)} %"


def headline_rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """One dict of text cells per system: never a rate without its n, unit and interval."""
    return [
        {
            "system": name,
            "hallucinated": show_rate(figures["rates"][PRIMARY]),
            "wrong": show_rate(figures["rates"]["statement_rate"]),
            "left out": show_rate(figures["rates"]["omission_rate"]),
            "answered": f"{figures['answered']} of {figures['n']}",
            "words": f"{figures['mean_words']:.1f}",
            "cut off": f"{figures['truncated']} of {figures['n']}",
        }
        for name, figures in summary["systems"].items()
    ]


def result_sentences(summary: dict[str, Any]) -> list[str]:
    """What was measured, in sentences: rates, paired comparisons, guardrails (a warning for each
    that is red), and what a small n or this detector cannot show."""
    grouped = groupby(summary["guardrails"], key=lambda entry: (entry["a"], entry["b"]))
    text = load_templates().get_template("sentences.txt.j2").render(
        summary=summary, small_n=say_small_n(summary["n"]),
        guardrails=[(pair, list(checked)) for pair, checked in grouped],
    )  # fmt: skip
    return text.splitlines()


def say_small_n(n: int) -> str:
    """What n items cannot show, with the case's own example of 60 %. That 6 changed items and 36
    items are needed follows from exact McNemar (`rates.paired_power`)."""
    example = rate(round(0.6 * n), n, "summaries")
    return (
        f"n = {n} is small: after {example} every rate in that interval is possible; no result "
        "with fewer than 6 changed items can reach p < 0.05; and to show a fall from 60 % to 30 % "
        "takes about 36 items, each under both systems."
    )
