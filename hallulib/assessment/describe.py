"""The result in words: never a bare percentage, never a script taken for a person."""

from __future__ import annotations

from hallulib.assessment.events import SIMULATED
from hallulib.evaluation.calibration import FEWEST_GRADED, FEWEST_OF_EACH


def describe(result: dict) -> list[str]:
    """Sentences for an `AssessmentResult` as a dict: rates, agreement, what is missing."""
    parts = (_describe_rates, _describe_calibration, _describe_agreement, _describe_assessors,
             _describe_limits)  # fmt: skip
    return [line for part in parts for line in part(result)]


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
    for found in result["by_sentence"]:
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(found["types"].items()))
        lines.append(
            f"{found['system']}: {found['hallucinated']} of {found['n']} sentences "
            f"({found['value']:.1%}, interval {found['low']:.1%} to {found['high']:.1%}) "
            f"hallucinated{f' ({kinds})' if kinds else ''}, {found['major']} major; "
            f"{found['general_knowledge']} general knowledge; something left out in "
            f"{found['omitting']} of {found['summaries']} summaries."
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


def _describe_calibration(result: dict) -> list[str]:
    """One line a system where the grades were enough to correct the detector, else one in all."""
    corrected = [found for found in result["calibrated"] if found["method"] == "PPI++"]
    lines = [
        f"{found['system']}, the detector corrected by {found['graded']} grades on "
        f"{found['scored']} more summaries (PPI++): {found['value']:.0%}, "
        f"interval {found['low']:.0%} to {found['high']:.0%}."
        for found in corrected
    ]
    if result["calibrated"] and not corrected:
        lines.append(
            f"Too few grades to correct the detector by (PPI++ asks for {FEWEST_GRADED} a system, "
            f"{FEWEST_OF_EACH} of each kind); the rates above rest on the grades alone."
        )
    return lines


def _describe_assessors(result: dict) -> list[str]:
    found = result["assessors"]
    who = "Simulated assessors" if found.get("kind") == SIMULATED else "Assessors"
    lines = [
        f"{who} {pair['first']} and {pair['second']} agree on {pair['agreed']} of {pair['n']} "
        f"({pair['share']:.0%}, interval {pair['low']:.0%} to {pair['high']:.0%}); "
        f"kappa {pair['kappa_text']}."
        for pair in found.get("pairs", ())
    ]
    if lines:
        lines.append(
            f"Krippendorff's alpha over {found['n']} summaries: {found['alpha_text']}; "
            f"{found['disagreements']} in dispute, {result['adjudicated']} adjudicated."
        )
    return lines


def _describe_limits(result: dict) -> list[str]:
    lines = [
        f"{result['graded']} of {result['total']} items graded, {result['unfinished']} unfinished "
        f"({result['skipped']} of them skipped)."
    ]
    if result["suggested"]:
        lines.append(
            f"{result['suggested']} of them were graded with the detector's suggestions in view."
        )
    if result['assessor_kind'] == SIMULATED:
        lines.append(
            "These grades come from a script that copies the detector and errs now and then: they "
            "show that the tool works, and say nothing about a person's judgement."
        )
    return lines
