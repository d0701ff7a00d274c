"""Sequential DPO: pairs, the cached reference, and the training that uses it."""

from __future__ import annotations

import lazy_loader

# Loaded on first use: `dpo.losses` is a leaf that needs none of the rest.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arms": ["train_comparison_arms"],
        "losses": ["dpo_loss"],
        "pairs": ["build_judge", "build_pairs"],
        "reference_cache": ["ReferenceCache", "cache_reference", "load_pairs"],
        "strategies": ["compare_strategies"],
        "train": ["train_dpo"],
    },
)
