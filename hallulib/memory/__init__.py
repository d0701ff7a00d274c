"""The memory budget: what a strategy needs, predicted from a configuration alone."""

from __future__ import annotations

from importlib import import_module

# Loaded on first use, so that naming a strategy does not load torch.
_HOMES = {
    "STRATEGIES": "strategies",
    "BudgetResult": "budget",
    "MemoryBudget": "peak",
    "ParameterCounts": "counts",
    "Strategy": "strategies",
    "compare_with_measured": "budget",
    "count_parameters": "counts",
    "load_budget_result": "budget",
    "load_model_config": "counts",
    "predict_budget": "budget",
    "predict_peak": "peak",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
