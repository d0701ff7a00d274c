"""The evaluation in words, tables and marked text; every number is read from summary.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hallulib.evaluation.metrics import PRIMARY
from hallulib.evaluation.power import fewest_fixed_to_show, paired_sample_size
from hallulib.evaluation.statistics import wilson_interval

SMALL_N = 40  # below this, the report says what its n cannot show
GUARDRAIL_NAMES = {
    "omission_rate": "left out of what should be said",
    "answer_rate": "summaries with an answer",
    "unparsed_statement_rate": "statements nobody can read",
    "mean_words": "words per summary",
}


def headline_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One dict per system with text cells: never a rate without its n and interval."""
    return [
        {
            "system": name,
            "hallucinated summaries": describe_rate(figures["rates"][PRIMARY]),
            "wrong statements": describe_rate(figures["rates"]["statement_rate"], counts=False),
            "left out": describe_rate(figures["rates"]["omission_rate"], counts=False),
            "answered": f"{figures['answered']} of {figures['n']}",
            "words": format_number(figures["mean_words"]),
            "cut off": f"{figures['truncated']} of {figures['n']}",
        }
        for name, figures in summary["systems"].items()
    ]


def headline_table(summary: dict[str, Any]) -> str:
    """The headline as a Markdown table."""
    rows = headline_rows(summary)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_rate(rate: dict[str, Any] | None, counts: bool = True) -> str:
    """'6 of 10 (60 %, 31-83 %)', without the counts '60 % (31-83 %)'; 'not measured' for None."""
    if rate is None:
        return "not measured"
    span = f"{percent(rate['low'], False)}-{percent(rate['high'])}"
    if counts:
        return f"{rate['k']} of {rate['n']} ({percent(rate['value'])}, {span})"
    return f"{percent(rate['value'])} ({span})"


def describe_omissions(rate: dict[str, Any] | None) -> str:
    """'0.1 % (0-0.2 %) of what should be said', with the unit that says what that is."""
    text = describe_rate(rate, counts=False)
    return text if rate is None else f"{text} of what should be said (unit: {rate['unit']})"


def percent(share: float, sign: bool = True) -> str:
    """A share as percent: whole from 10 on, one decimal below; a blank before the sign."""
    value = 100 * share
    text = f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}"
    return f"{text} %" if sign else text


def format_number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def format_p(p: float) -> str:
    """A p value as one writes it: three decimals, scientific below 0.001."""
    return f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.1e}"


def result_sentences(summary: dict[str, Any]) -> list[str]:
    """What was measured, in sentences: rates, paired comparisons, guardrails, and small n."""
    sentences = [_say_rate(name, figures) for name, figures in summary["systems"].items()]
    sentences += say_all(summary["all_systems"])
    sentences += [_say_comparison(comparison) for comparison in summary["comparisons"]]
    for comparison in summary["comparisons"]:
        sentences += say_guardrails(summary, comparison["a"], comparison["b"])
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
    rate = figures["rates"][PRIMARY]
    if rate is None:
        return f"{name}: none of {figures['n']} summaries could be read, so there is no rate."
    return (
        f"{name}: {rate['k']} of {rate['n']} answered summaries ({percent(rate['value'])}, "
        f"{100 * rate['level']:.0f} % {rate['method']} interval {percent(rate['low'], False)}-"
        f"{percent(rate['high'])}) hold at least one hallucinated statement; "
        f"{figures['answered']} of {figures['n']} answered, {format_number(figures['mean_words'])} "
        f"words, left out {describe_omissions(figures['rates']['omission_rate'])}."
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
        f"{a}, c = {paired['c']} only under {b}; the rate changes by "
        f"{describe_change(paired['difference'])} points ({100 * paired['level']:.0f} % interval "
        f"{describe_change(paired['high'])} to {describe_change(paired['low'])}), exact McNemar "
        f"{format_p(paired['p_exact'])}, among all comparisons (Holm) "
        f"{format_p(paired['p_holm'])}: {verdict}{left_out}."
    )


def describe_change(fall: float) -> str:
    """A fall of a rate as the change in points, with its sign: 0.575 is "-57.5", 0 is "+0.0"."""
    return f"{round(-100 * fall, 1) + 0.0:+.1f}"


def say_guardrails(summary: dict[str, Any], a: str, b: str) -> list[str]:
    """Sentences on the guardrails of one comparison: a warning for each that is red, else one line
    that they held; nothing where none was checked."""
    checked = [g for g in summary["guardrails"] if (g["a"], g["b"]) == (a, b)]
    red = [g for g in checked if not g["ok"]]
    if not checked:
        return []
    if not red:
        names = ", ".join(GUARDRAIL_NAMES[entry["name"]] for entry in checked)
        return [f"Guardrails {a} -> {b}: held ({names})."]
    lower = summary["systems"][b]["hallucinated"] < summary["systems"][a]["hallucinated"]
    paid = ": the lower rate was bought with it" if lower else ""
    return [f"GUARDRAIL {a} -> {b}: {_say_change(entry)}{paid}." for entry in red]


def _say_change(entry: dict[str, Any]) -> str:
    name = GUARDRAIL_NAMES[entry["name"]]
    if entry["name"] == "mean_words":
        return f"{name} {entry['before']:.1f} -> {entry['after']:.1f}"
    return f"{name} {percent(entry['before'])} -> {percent(entry['after'])}"


def say_small_n(n: int, before: float = 0.6, after: float = 0.3) -> str:
    """What n items cannot show, with the case's own example."""
    k = round(before * n)
    interval = wilson_interval(k, n)
    need = paired_sample_size(before, after)
    return (
        f"n = {n} is small: {k} of {n} would already mean anything from "
        f"{percent(interval.low, False)} to {percent(interval.high)}, no result with fewer than "
        f"{fewest_fixed_to_show()} changed items can reach p < 0.05, and showing a fall from "
        f"{percent(before)} to {percent(after)} takes about {need} items, each under both systems."
    )


def find_changed_items(
    records: Sequence[dict[str, Any]], a: str, b: str
) -> dict[str, list[str]]:
    """Ids by what happened from system a to b: {fixed, broken, both_bad, both_good}, and
    "unanswered" where one of them gave nothing that could be read."""
    state = {(r["system"], r["id"]): r["hallucinated"] for r in records}
    names = {(True, False): "fixed", (False, True): "broken", (True, True): "both_bad",
             (False, False): "both_good"}  # fmt: skip
    found: dict[str, list[str]] = {name: [] for name in (*names.values(), "unanswered")}
    for (system, item), before in state.items():
        if system == a and (b, item) in state:
            found[names.get((before, state[b, item]), "unanswered")].append(item)
    return found
