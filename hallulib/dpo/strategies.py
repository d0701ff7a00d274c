"""Where the reference's log-probabilities can come from: four ways, one loss, and what each costs.

The course trains with the cache. The others are here to be compared with it, and to show why one
of them, the disabled adapter, answers another question once there is an SFT adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pandas as pd
import torch
from peft import PeftModel

from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.logprobs import completion_logps, sum_completions
from hallulib.dpo.losses import dpo_loss
from hallulib.dpo.reference_cache import ReferenceCache, load_pairs
from hallulib.models import load_policy, load_tokenizer, use_system
from hallulib.recipe import Recipe
from hallulib.run import Run

# Within the context the model that it gives answers as the reference.
Reference = Callable[[PeftModel, Recipe, Run], AbstractContextManager[PeftModel]]


@contextmanager
def dual_model(policy: PeftModel, recipe: Recipe, run: Run) -> Iterator[PeftModel]:
    """A second copy of everything: base weights and SFT adapter."""
    yield load_policy(recipe, run.require("sft/adapter"), trainable=False)


@contextmanager
def adapter_copy(policy: PeftModel, recipe: Recipe, run: Run) -> Iterator[PeftModel]:
    """One base model; the SFT adapter is loaded beside the one that is trained."""
    policy.load_adapter(str(run.require("sft/adapter")), "reference")
    try:
        with use_system(policy, "reference"):
            yield policy
    finally:
        policy.delete_adapter("reference")


def disabled_adapter(
    policy: PeftModel, recipe: Recipe, run: Run
) -> AbstractContextManager[PeftModel]:
    """The base model without any adapter: the right reference only where there was no SFT."""
    return use_system(policy, "base")


LIVE: dict[str, Reference] = {
    "dual model": dual_model,
    "adapter copy": adapter_copy,
    "disabled adapter": disabled_adapter,
}


@torch.no_grad()
def compare_strategies(recipe: Recipe, run: Run, count: int = 8) -> pd.DataFrame:
    """Return one row for each strategy, from the first `count` validation pairs.

    start_loss: DPO loss of the SFT policy, ln 2 where the reference is right. trained_loss: that of
    the finished DPO policy. extra_bytes: tensors held for the reference alone. passes: forward
    passes of the reference in each step. seconds: of one such pass here.
    """
    tokenizer = load_tokenizer(recipe)
    start = load_policy(recipe, run.require("sft/adapter"), trainable=False)
    policy = load_policy(recipe, run.require("dpo/adapter"), trainable=False)
    pairs = load_pairs(run, "validation", tokenizer, recipe).pairs[:count]
    device = next(policy.parameters()).device
    batch = collate_pairs(pairs, tokenizer.pad_token_id)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    policies = [sum_completions(completion_logps(model, batch)) for model in (start, policy)]

    cache = ReferenceCache.open(run.require("reference"), recipe, start, tokenizer)
    found, seconds = _clock(lambda: _look_up(cache, pairs).to(device))
    rows = [_describe("cached", policies, found, recipe, seconds) | {"extra_bytes": 0, "passes": 0}]
    for name, reference in LIVE.items():
        before = _count_bytes([policy])
        with reference(policy, recipe, run) as model:
            found, seconds = _clock(lambda: sum_completions(completion_logps(model, batch)))  # noqa: B023
            extra = _count_bytes([policy, model]) - before
        row = _describe(name, policies, found, recipe, seconds)
        rows.append(row | {"extra_bytes": extra, "passes": 1})
    return pd.DataFrame(rows).set_index("strategy")


def _look_up(cache: ReferenceCache, pairs: list[TokenPair]) -> torch.Tensor:
    rows = cache.lookup(pairs)
    return torch.tensor([float(row[side].sum()) for side in (0, 1) for row in rows])


def _clock(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _describe(
    name: str, policies: list[torch.Tensor], reference: torch.Tensor, recipe: Recipe, seconds: float
) -> dict[str, str | float]:
    losses = [
        dpo_loss(*sums.chunk(2), *reference.chunk(2), recipe.dpo.beta)[0].mean().item()
        for sums in policies
    ]
    return {
        "strategy": name, "start_loss": losses[0], "trained_loss": losses[1], "seconds": seconds,
    }  # fmt: skip


def _count_bytes(models: Iterable[torch.nn.Module]) -> int:
    """Bytes of all distinct parameters."""
    sizes = {p.data_ptr(): p.numel() * p.element_size() for m in models for p in m.parameters()}
    return sum(sizes.values())
