"""Human assessment: a blinded session that survives a crash, a thin widget, and its analysis."""

from __future__ import annotations

from importlib import import_module

# Loaded on first use: a session needs no ipywidgets, and a widget needs no scikit-learn.
_HOMES = {
    "AssessmentResult": "analyse",
    "AssessmentSession": "session",
    "AssessmentWidget": "widget",
    "SessionSettings": "session",
    "analyse_assessment": "analyse",
    "load_assessment_result": "analyse",
    "judge_by_evaluation": "simulate",
    "open_session": "session",
    "simulate_assessment": "simulate",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
