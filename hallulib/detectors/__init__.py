"""Detectors: one protocol, `judge(source, summary)`, for making pairs and for evaluation.

`nli` stands aside: it is the only one that needs torch, and is imported when it is asked for.
"""

from __future__ import annotations

from hallulib.detectors.base import Detector, Judgement, NoisyJudge, Source, StatementVerdict
from hallulib.detectors.edits import choose_edits, find_edits
from hallulib.detectors.entities import EntitiesDetector
from hallulib.detectors.facts import FactsDetector
from hallulib.detectors.quality import Case, measure_detector, measure_judge
from hallulib.detectors.tokens import find_sentences
from hallulib.errors import RecipeError

__all__ = [
    "Case", "Detector", "FactsDetector", "Judgement", "NoisyJudge", "Source", "StatementVerdict",
    "choose_edits", "find_edits", "find_sentences", "get_detector", "measure_detector",
    "measure_judge",
]  # fmt: skip


def get_detector(name: str, **options: str) -> Detector:
    """The detector facts, entities or nli; options (name_or_path, device) go to that of nli.

    Raises RecipeError for an unknown name.
    """
    if name == "nli":
        from hallulib.detectors.nli import NliDetector

        return NliDetector(**options)
    detectors = {"facts": FactsDetector, "entities": EntitiesDetector}
    if name not in detectors:
        raise RecipeError(f"there is no detector {name!r}", "use one of: facts, entities, nli")
    return detectors[name]()
