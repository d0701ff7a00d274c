"""Per-token log-probabilities of the completions of a batch."""

from __future__ import annotations

import torch

from hallulib.scoring import score_completions


def completion_logps(
    model: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logps, mask), both (rows, tokens - 1): float32 nats, 0 outside the completion.

    Column t belongs to token t + 1 of the row, which position t predicts. The first token of the
    completion is scored, no token of the prompt is. Sum over dim 1 for the completion's log-prob.
    """
    mask = batch["completion_mask"][:, 1:]
    flat, _ = score_completions(model, batch["input_ids"], batch["completion_mask"])
    logps = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
    return logps, mask
