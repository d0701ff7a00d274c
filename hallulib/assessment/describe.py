"""The result in words: never a bare percentage, never a script taken for a person."""

from __future__ import annotations

from hallulib.assessment.events import SIMULATED


def describe(result: dict) -> list[str]:
    """Sentences for an `AssessmentResult` as a dict: rates, agreement, what is missing."""
    return [*_describe_rates(result), *_describe_agreement(result), *_describe_limits(result)]


def _describe_rates(result: dict) -> list[str]:
    who = "a SIMULATED assessor" if result['assessor_kind'] == SIMULATED else "1 person, blind"
    lines = [
        f"{rate['system']}: {rate['k']} of {rate['n']} summaries ({rate['value']:.0%}, 95 % Wilson "
        f"interval {rate['low']:.0%} to {rate['high']:.0%}) hallucinated; {rate['unsure']} unsure; "
        f"graded by {who}."
        for rate in result['systems']
    ]
    if result['paired']:
        p = result['paired']
        lines.append(
            f"On the {p['n']} notes graded under both: {p['b']} wrong only under sft, {p['c']} "
            f"only under dpo; exact McNemar p = {p['p_exact']:.3g}."
        )
    if result['mode'] == "ab":
        counts = ", ".join(f"{name} {count}" for name, count in result['preferences'].items())
        lines.append(f"Preferred, of {sum(result['preferences'].values())} pairs: {counts}.")
    return lines


def _describe_agreement(result: dict) -> list[str]:
    lines = []
    for label, found in (
        (f"Assessor and detector '{result['detector']['detector']}'", result['detector']),
        ("The assessor with themselves (repeated items)", result['intra_rater']),
    ):
        if found["n"]:
            lines.append(
                f"{label} agree on {found['agreed']} of {found['n']} ({found['share']:.0%}, "
                f"interval {found['low']:.0%} to {found['high']:.0%}); "
                f"kappa {found['kappa_text']}."
            )
    return lines


def _describe_limits(result: dict) -> list[str]:
    lines = [
        f"{result['graded']} of {result['total']} items graded, {result['unfinished']} unfinished "
        f"({result['skipped']} of them skipped)."
    ]
    if result['assessor_kind'] == SIMULATED:
        lines.append(
            "These grades come from a script that copies the detector and errs now and then: they "
            "show that the tool works, and say nothing about a person's judgement."
        )
    return lines
