"""The memory budget: what a strategy needs, predicted by running the real step on fake tensors."""

from hallulib.memory.budget import (
    LARGE,
    check_fits,
    check_on_this_machine,
    compare_with_measured,
    predict_budget,
    predict_large,
)
from hallulib.memory.explorer import Explorer, plot_bars
from hallulib.memory.passes import STRATEGIES, train_once
from hallulib.memory.peak import list_terms, predict_peak
from hallulib.memory.skeleton import load_model_config, swap_for_fake
from hallulib.memory.tracker import StorageTracker, follow_model

__all__ = [
    "LARGE", "STRATEGIES", "Explorer", "StorageTracker", "check_fits", "check_on_this_machine",
    "compare_with_measured", "follow_model", "list_terms", "load_model_config",
    "plot_bars", "predict_budget", "predict_large", "predict_peak", "swap_for_fake", "train_once",
]  # fmt: skip
