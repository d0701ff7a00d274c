"""Evaluation: rates with intervals, paired comparisons, guardrails, the report, the model card.

Names are loaded on first use, because `evaluation.statistics` is a leaf that other rooms import:
importing it must neither load torch nor make a circle.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "EvaluationResult": "evaluate",
    "check_independent_detector": "evaluate",
    "evaluate_systems": "evaluate",
    "load_evaluation_result": "evaluate",
    "change_on_item": "highlight",
    "find_changed_items": "report",
    "headline_rows": "report",
    "headline_table": "report",
    "highlight_facts": "highlight",
    "highlight_statements": "highlight",
    "result_sentences": "report",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
