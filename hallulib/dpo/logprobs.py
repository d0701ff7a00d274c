"""Per-token log-probabilities of the completions of a batch, in either layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.prefix_sharing import NAME, PairLayout, enable_prefix_sharing
from hallulib.scoring import read_hidden_states, score_tokens, unwrap_model

CHECKED_PAIRS = 4  # scored both ways before prompts are shared
# How far a token's log-prob (nats) may differ between the layouts before sharing is given up.
LAYOUT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}


def completion_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the log-probs (tokens,) of each completion: float32 nats, chosen first, then rejected.

    The first token of the completion is scored, no token of the prompt is. `batch` comes from
    :func:`hallulib.dpo.batching.collate_pairs`.
    """
    inputs = {"input_ids": batch["input_ids"]}
    if "pair_lengths" in batch:
        inputs |= {
            "position_ids": batch["position_ids"],
            "pair_layout": PairLayout(tuple(map(tuple, batch["pair_lengths"].tolist()))),
            # Four-dimensional, so that transformers takes it as it is and builds none of its own.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        }
    hidden = read_hidden_states(model, **inputs)
    logps, _ = score_tokens(model, hidden.flatten(0, 1)[batch["predictors"]], batch["targets"])
    return list(logps.split(batch["counts"].tolist()))


def sum_completions(logps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the summed log-prob of each completion, (completions,)."""
    return torch.stack([tokens.sum() for tokens in logps])


@dataclass(frozen=True)
class LayoutChoice:
    """Whether prompts are shared, and why (not); `difference` is the self-check's, in nats."""

    shared: bool
    reason: str
    difference: float | None = None

    def __str__(self) -> str:
        how = "each prompt runs once" if self.shared else "each prompt runs twice"
        return f"{how}: {self.reason}"


def choose_layout(
    model: torch.nn.Module, pairs: Sequence[TokenPair], pad_id: int, prefix_sharing: str, dtype: str
) -> LayoutChoice:
    """Share prompts where the model can, shown on a few `pairs`; else say why it cannot.

    `prefix_sharing` is "auto" or "off". Both layouts score the same pairs once, without gradients.
    A model whose attention does not go through transformers' interface, or adds something this
    cannot express, falls back to the plain layout here.
    """
    if prefix_sharing == "off":
        return LayoutChoice(False, "dpo.prefix_sharing is off")
    base = unwrap_model(model)
    before = base.config._attn_implementation
    if before not in ("sdpa", NAME):
        return LayoutChoice(False, f"model.attention is {before}, not sdpa")
    try:
        difference = _compare_layouts(model, base, pairs[:CHECKED_PAIRS], pad_id)
    except Exception as error:  # whatever a foreign architecture raises: the plain layout works
        reason = f"{type(base).__name__} cannot: {type(error).__name__}: {error}"
        difference = None
    else:
        limit = LAYOUT_TOLERANCE[dtype]
        if difference <= limit:
            return LayoutChoice(True, "both layouts agree", difference)
        reason = f"the layouts differ by {difference:.3g} nats (up to {limit} is rounding)"
    base.set_attn_implementation(before)
    return LayoutChoice(False, reason, difference)


@torch.no_grad()
def _compare_layouts(
    model: torch.nn.Module, base: PreTrainedModel, pairs: Sequence[TokenPair], pad_id: int
) -> float:
    device, training = next(base.parameters()).device, model.training
    plain, shared = (
        {name: value.to(device) for name, value in collate_pairs(pairs, pad_id, how).items()}
        for how in (False, True)
    )
    model.eval()
    try:
        expected = torch.cat(completion_logps(model, plain))
        enable_prefix_sharing(base)
        found = torch.cat(completion_logps(model, shared))
    finally:
        model.train(training)
    return (found - expected).abs().max().item()
