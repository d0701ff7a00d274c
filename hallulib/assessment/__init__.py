"""Human assessment: a blinded session that survives a crash, a thin widget, and its analysis."""

from __future__ import annotations

import lazy_loader

# Loaded on first use: a session needs no ipywidgets, and a widget needs no scikit-learn.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adjudicate": ["Adjudication", "open_adjudication"],
        "analyse": ["AssessmentResult", "analyse_assessment", "load_assessment_result"],
        "exports": ["export_assessment", "make_preference_pairs"],
        "opening": ["read_guideline"],
        "practice": ["explain_grades", "judge_practice", "open_practice", "score_practice"],
        "session": ["AssessmentSession", "SessionSettings"],
        "start": ["open_session"],
        "simulate": ["judge_by_evaluation", "simulate_assessment"],
        "widget": ["AssessmentWidget"],
    },
)
