"""Opening sessions on a run: an assessor's own, or the adjudication of several."""

from __future__ import annotations

from pathlib import Path

from hallulib.assessment.opening import SessionSettings, read_generations
from hallulib.assessment.session import AssessmentSession
from hallulib.recipe import Recipe
from hallulib.run import Run

GENERATIONS = "evaluation/generations.jsonl"


def open_session(run: Run, recipe: Recipe, assessor: str = "", name: str = "") -> AssessmentSession:
    """Start or continue the session of `assessor` (default: the recipe's) on this run's summaries.

    An assessor called "simulated" is recorded as such. Raises MissingArtifact before notebook 06,
    SessionError when the session is open elsewhere or belongs to other summaries.
    """
    chosen = recipe.assessment
    settings = SessionSettings(
        assessor=assessor or chosen.assessor,
        mode=chosen.mode,
        items=chosen.items,
        repeat_share=chosen.repeat_share,
        seed=recipe.seed,
        name=name,
    )
    return AssessmentSession(folder_of(run), read_generations(run.require(GENERATIONS)), settings)


def folder_of(run: Run) -> Path:
    """Where the sessions of a run lie."""
    return run.path("assessment")
