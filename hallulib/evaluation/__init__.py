"""Evaluation: rates with intervals, paired comparisons, guardrails, the report, the model card.

Names are loaded on first use, because `evaluation.statistics` is a leaf that other rooms import:
importing it must neither load torch nor make a circle.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "evaluate": [
            "EvaluationResult",
            "check_independent_detector",
            "evaluate_systems",
            "load_evaluation_result",
        ],
        "highlight": ["change_on_item", "highlight_facts", "highlight_statements"],
        "report": [
            "find_changed_items",
            "headline_rows",
            "headline_table",
            "result_sentences",
            "say_small_n",
        ],
    },
)
