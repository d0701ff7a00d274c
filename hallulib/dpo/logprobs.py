"""Per-token log-probabilities of the completions of a batch, in either layout."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.prefix_sharing import NAME, PairLayout, enable_prefix_sharing
from hallulib.errors import GateFailed
from hallulib.scoring import read_hidden_states, score_tokens, unwrap_model

CHECKED_PAIRS = 4  # scored both ways before prompts are shared
# How far a token's log-prob (nats) may lie from the same one computed in another layout or in a
# batch of another shape; measured: 1e-4 in float32, 0.02 in bfloat16.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}

Row = tuple[np.ndarray, np.ndarray]  # log-probs of the chosen and rejected tokens, float32 nats


def completion_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the log-probs (tokens,) of each completion of a batch, chosen first: float32 nats.

    The completion's first token is scored, and nothing of the prompt.
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


@torch.no_grad()
def compute_logps(
    policy: torch.nn.Module, pairs: Sequence[TokenPair], pad_id: int, shared: bool = False
) -> list[Row]:
    """Return per-token log-probs (chosen, rejected) of each pair, with dropout off.

    Raises GateFailed for a value that is not a number.
    """
    policy.eval()
    device = next(policy.parameters()).device
    batch = {name: t.to(device) for name, t in collate_pairs(pairs, pad_id, shared).items()}
    rows = [logps.cpu().numpy() for logps in completion_logps(policy, batch)]
    if not all(np.isfinite(row).all() for row in rows):
        raise GateFailed(
            "The policy gives a completion a log-probability that is not a number.",
            "Train SFT again with a lower learning rate; with float16 try bfloat16 or float32.",
        )
    return list(zip(rows[: len(pairs)], rows[len(pairs) :], strict=True))


def sum_completions(logps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the summed log-prob of each completion, (completions,)."""
    return torch.stack([tokens.sum() for tokens in logps])


class LayoutChoice(NamedTuple):
    """Whether prompts are shared, and why (not); `difference` of a token between the two layouts,
    in nats (nan where they were not compared)."""

    shared: bool
    reason: str
    difference: float = math.nan


def choose_layout(
    model: torch.nn.Module, pairs: Sequence[TokenPair], pad_id: int, prefix_sharing: str, dtype: str
) -> LayoutChoice:
    """Share prompts where the model can, shown on a few `pairs`; else say why it cannot.

    `prefix_sharing` is "auto" or "off". A model whose attention does not go through transformers'
    interface, or adds something this cannot express, falls back to the plain layout here.
    """
    if prefix_sharing == "off":
        return LayoutChoice(False, "dpo.prefix_sharing is off")
    base, training, checked = unwrap_model(model), model.training, pairs[:CHECKED_PAIRS]
    before, difference, limit = base.config._attn_implementation, math.nan, TOLERANCE[dtype]
    if before not in ("sdpa", NAME):
        return LayoutChoice(False, f"model.attention is {before}, not sdpa")
    try:
        plain = compute_logps(model, checked, pad_id)
        enable_prefix_sharing(base)
        shared = compute_logps(model, checked, pad_id, shared=True)
        rows = [np.concatenate(sides) for sides in (sum(plain, ()), sum(shared, ()))]
        difference = float(np.abs(rows[0] - rows[1]).max())
        reason = f"the layouts differ by {difference:.3g} nats (up to {limit} is rounding)"
    except Exception as error:  # whatever a foreign architecture raises: the plain layout works
        reason = f"{type(base).__name__} cannot: {type(error).__name__}: {error}"
    finally:
        model.train(training)
    if difference <= limit:
        return LayoutChoice(True, "both layouts agree", difference)
    base.set_attn_implementation(before)
    return LayoutChoice(False, reason, difference)
