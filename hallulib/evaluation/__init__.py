"""Evaluation: rates with intervals, paired comparisons, guardrails, the report, the model card."""

from __future__ import annotations

from hallulib.evaluation.evaluate import EvaluationResult, evaluate_systems
from hallulib.evaluation.highlight import highlight_statements
from hallulib.evaluation.metrics import PRIMARY, build_summary, find_changed_items, make_record
from hallulib.evaluation.pages import change_on_item
from hallulib.evaluation.sentences import headline_rows, result_sentences, say_small_n

__all__ = [
    "PRIMARY", "EvaluationResult", "build_summary", "change_on_item", "evaluate_systems",
    "find_changed_items", "headline_rows", "highlight_statements", "make_record",
    "result_sentences", "say_small_n",
]  # fmt: skip
