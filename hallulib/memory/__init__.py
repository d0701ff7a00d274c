"""The memory budget: what a strategy needs, predicted by running the real step on fake tensors."""

from __future__ import annotations

import lazy_loader

# Loaded on first use, so that naming a strategy does not load torch.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "budget": [
            "BudgetResult",
            "check_on_this_machine",
            "compare_with_measured",
            "load_budget_result",
            "predict_budget",
        ],
        "counts": ["ParameterCounts", "count_parameters", "load_model_config"],
        "peak": ["MemoryBudget", "predict_peak"],
        "preflight": ["check_fits"],
        "strategies": ["STRATEGIES", "Strategy"],
        "tracing": ["Levers"],
    },  # fmt: skip
)
