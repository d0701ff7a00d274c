"""Human assessment: a blinded session that survives a crash, a thin widget, and its analysis."""

from hallulib.assessment.analyse import analyse_assessment, open_adjudication
from hallulib.assessment.export import export_assessment
from hallulib.assessment.scripted import (
    explain_grades,
    judge_by_evaluation,
    judge_practice,
    open_practice,
    simulate_assessment,
)
from hallulib.assessment.session import open_session, read_guideline
from hallulib.assessment.widget import AssessmentWidget

__all__ = [
    "AssessmentWidget", "analyse_assessment", "explain_grades", "export_assessment",
    "judge_by_evaluation", "judge_practice", "open_adjudication", "open_practice", "open_session",
    "read_guideline", "simulate_assessment",
]  # fmt: skip
