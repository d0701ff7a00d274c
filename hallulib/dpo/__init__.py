"""Sequential DPO: pairs, the cached reference, and the training that uses it."""

from hallulib.dpo.batching import load_pairs
from hallulib.dpo.logprobs import choose_layout
from hallulib.dpo.losses import dpo_loss
from hallulib.dpo.pairs import build_judge, build_pairs
from hallulib.dpo.prefix_sharing import PairLayout
from hallulib.dpo.reference import ReferenceCache, cache_reference
from hallulib.dpo.train import train_comparison_arms, train_dpo

__all__ = [
    "PairLayout", "ReferenceCache", "build_judge", "build_pairs", "cache_reference",
    "choose_layout", "dpo_loss", "load_pairs", "train_comparison_arms", "train_dpo",
]  # fmt: skip
