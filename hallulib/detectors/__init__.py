"""Detectors: one protocol, `judge(source, summary)`, for making pairs and for evaluation."""

from __future__ import annotations

from hallulib.detectors.base import (
    Detector,
    Judgement,
    Source,
    StatementVerdict,
)
from hallulib.detectors.entities import EntitiesDetector
from hallulib.detectors.facts import FactsDetector
from hallulib.detectors.noisy import NoisyJudge
from hallulib.detectors.quality import Case, measure_detector, measure_judge
from hallulib.errors import RecipeError

DETECTORS = ("facts", "entities", "nli")

__all__ = [
    "DETECTORS", "Case", "Detector", "EntitiesDetector", "FactsDetector", "Judgement", "NoisyJudge",
    "Source", "StatementVerdict", "get_detector", "measure_detector",
    "measure_judge",
]  # fmt: skip


def get_detector(name: str, **options: object) -> Detector:
    """Return the detector of that name; options go to its constructor.

    Raises RecipeError for an unknown name, naming those there are.
    """
    if name not in DETECTORS:
        raise RecipeError(
            f"there is no detector called {name!r}", f"use one of: {', '.join(DETECTORS)}"
        )
    if name == "nli":  # the only one that needs torch, so it is loaded when it is asked for
        from hallulib.detectors.nli import NliDetector

        return NliDetector(**options)
    return {"facts": FactsDetector, "entities": EntitiesDetector}[name](**options)
