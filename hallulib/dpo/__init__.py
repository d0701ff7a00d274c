"""Sequential DPO: pairs, the cached reference, and the training that uses it."""

from __future__ import annotations

from importlib import import_module

# Loaded on first use: `dpo.losses` is a leaf that needs none of the rest.
_HOMES = {
    "ReferenceCache": "reference_cache",
    "build_judge": "pairs",
    "build_pairs": "pairs",
    "cache_reference": "reference_cache",
    "dpo_loss": "losses",
    "load_pairs": "reference_cache",
    "train_comparison_arms": "arms",
    "train_dpo": "trainer",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
