"""Sequential DPO: pairs, the cached reference, and the training that uses it."""

from hallulib.dpo.batching import collate_pairs, load_pairs
from hallulib.dpo.guardrail import score_checks
from hallulib.dpo.logprobs import choose_layout, completion_logps, sum_completions
from hallulib.dpo.losses import dpo_loss
from hallulib.dpo.pairs import build_judge, build_pairs
from hallulib.dpo.prefix_sharing import PairLayout
from hallulib.dpo.reference import ReferenceCache, cache_reference
from hallulib.dpo.train import train_comparison_arms, train_dpo

__all__ = [
    "PairLayout", "ReferenceCache", "build_judge", "build_pairs", "cache_reference",
    "choose_layout", "collate_pairs", "completion_logps", "dpo_loss", "load_pairs", "score_checks",
    "sum_completions", "train_comparison_arms", "train_dpo",
]  # fmt: skip
