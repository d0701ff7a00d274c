"""The evaluation in words and table cells; every number is read from summary.json."""

from __future__ import annotations

from typing import Any

from hallulib.evaluation.metrics import PRIMARY
from hallulib.rates import Rate, format_p, percent, rate

SMALL_N = 40  # below this, the report says what its n cannot show
GUARDRAIL_NAMES = {
    "omission_rate": "left out of what should be said",
    "answer_rate": "summaries with an answer",
    "unparsed_statement_rate": "statements nobody can read",
    "mean_words": "words per summary",
}


def show_rate(found: dict[str, Any] | None) -> str:
    """A rate of summary.json as '6 of 10 summaries (60 %, 31-83 %)'; 'not measured' for None."""
    return str(Rate(**found)) if found else "not measured"


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
    """What was measured, in sentences: rates, paired comparisons, guardrails, and small n."""
    sentences = [_say_rate(name, figures) for name, figures in summary["systems"].items()]
    sentences += say_all(summary["all_systems"])
    sentences += [_say_comparison(comparison) for comparison in summary["comparisons"]]
    for comparison in summary["comparisons"]:
        sentences += _say_guardrails(summary, comparison["a"], comparison["b"])
    if summary["n"] < SMALL_N:
        sentences.append(say_small_n(summary["n"]))
    if summary["detector"] != "facts":
        sentences.append(
            f"The detector {summary['detector']} errs, and how often on this text was not measured "
            "here: compare systems with it, and let people grade (07_assessment_widget)."
        )
    if not summary.get("independent_detector", True):
        sentences.append(
            "CAUTION: the detector that reports also judged the training pairs, so these rates "
            "flatter every system trained on them. Let people grade (07_assessment_widget)."
        )
    return sentences


def _say_rate(name: str, figures: dict[str, Any]) -> str:
    rates, n = figures["rates"], figures["n"]
    if rates[PRIMARY] is None:
        return f"{name}: none of {n} summaries could be read, so there is no rate."
    return (
        f"{name}: {show_rate(rates[PRIMARY])} hold at least one hallucinated statement (95 % "
        f"Wilson interval); {figures['answered']} of {n} answered, {figures['mean_words']:.1f} "
        f"words, left out {show_rate(rates['omission_rate'])}."
    )


def say_all(found: dict[str, Any] | None) -> list[str]:
    """The sentence on the test of all systems at once; none where it was not made."""
    if found is None:
        return []
    verdict = "at least one differs" if found["p"] < 0.05 else "this n cannot tell them apart"
    return [
        f"All {len(found['systems'])} systems at once, on the {found['n']} items that each of them "
        f"answered: Cochran's Q {found['q']:.1f}, {format_p(found['p'])}: {verdict}."
    ]


def _say_comparison(comparison: dict[str, Any]) -> str:
    a, b, paired = comparison["a"], comparison["b"], comparison["paired"]
    if paired is None:
        return f"{a} -> {b}: no item was answered by both, so nothing can be compared."
    excluded = comparison["n_excluded"]
    left_out = f"; {excluded} left out, unanswered by one of them" if excluded else ""
    verdict = "a difference" if paired["p_holm"] < 0.05 else "no difference that this n can show"
    return (
        f"{a} -> {b}: on the same {paired['n']} items, b = {paired['b']} hallucinated only under "
        f"{a}, c = {paired['c']} only under {b}; the rate changes by {show_change(paired)}, "
        f"exact McNemar {format_p(paired['p'])}, among all comparisons (Holm) "
        f"{format_p(paired['p_holm'])}: {verdict}{left_out}."
    )


def show_change(paired: dict[str, Any]) -> str:
    """The fall of a rate as its change: "-57.5 points (95 %: -62.3 to -51.9)"."""
    bounds = (paired["difference"], paired["high"], paired["low"])
    value, low, high = (f"{round(-100 * fall, 1) + 0.0:+.1f}" for fall in bounds)
    return f"{value} points (95 %: {low} to {high})"


def _say_guardrails(summary: dict[str, Any], a: str, b: str) -> list[str]:
    """A warning for each guardrail of one comparison that is red, else one line that they held."""
    checked = [g for g in summary["guardrails"] if (g["a"], g["b"]) == (a, b)]
    red = [g for g in checked if not g["ok"]]
    if checked and not red:
        names = ", ".join(GUARDRAIL_NAMES[entry["name"]] for entry in checked)
        return [f"Guardrails {a} -> {b}: held ({names})."]
    lower = summary["systems"][b]["hallucinated"] < summary["systems"][a]["hallucinated"]
    paid = ": the lower rate was bought with it" if lower else ""
    return [
        f"GUARDRAIL {a} -> {b}: {GUARDRAIL_NAMES[g['name']]} {show_guarded(g, '->')}{paid}."
        for g in red
    ]


def show_guarded(entry: dict[str, Any], arrow: str = "to") -> str:
    """Both values of a guardrail in its unit: "0 % to 67 %", "21.3 to 18.0"."""
    is_share = entry["name"] != "mean_words"
    values = (entry["before"], entry["after"])
    before, after = (f"{percent(x)} %" if is_share else f"{x:.1f}" for x in values)
    return f"{before} {arrow} {after}"


def say_small_n(n: int) -> str:
    """What n items cannot show, with the case's own example of 60 %. That 6 changed items and 36
    items are needed follows from exact McNemar (`rates.paired_power`)."""
    example = rate(round(0.6 * n), n, "summaries")
    return (
        f"n = {n} is small: after {example} every rate in that interval is possible; no result "
        "with fewer than 6 changed items can reach p < 0.05; and to show a fall from 60 % to 30 % "
        "takes about 36 items, each under both systems."
    )
