"""The memory budget: what a strategy needs, predicted by running the real step on fake tensors."""

from hallulib.memory.budget import (
    LARGE,
    BudgetResult,
    check_fits,
    check_on_this_machine,
    compare_with_measured,
    load_budget_result,
    predict_budget,
    predict_large,
)
from hallulib.memory.counts import ParameterCounts, count_parameters, load_model_config
from hallulib.memory.explorer import make_explorer, plot_bars
from hallulib.memory.passes import STRATEGIES, Strategy, train_once
from hallulib.memory.peak import MemoryBudget, list_terms, predict_peak
from hallulib.memory.planner import find_reach, measure_rate
from hallulib.memory.skeleton import make_fake_mode, swap_for_fake
from hallulib.memory.tracker import StorageTracker, follow_model

__all__ = [
    "LARGE", "STRATEGIES", "BudgetResult", "MemoryBudget", "ParameterCounts", "StorageTracker",
    "Strategy", "check_fits", "check_on_this_machine", "compare_with_measured", "count_parameters",
    "find_reach", "follow_model", "list_terms", "load_budget_result", "load_model_config",
    "make_explorer", "make_fake_mode", "measure_rate", "plot_bars",
    "predict_budget", "predict_large", "predict_peak", "swap_for_fake", "train_once",
]  # fmt: skip
