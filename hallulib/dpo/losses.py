"""Preference losses as pure functions of 1-D tensors. Nothing of ours is imported here.

All take the summed log-probabilities of completions in nats, shape (pairs,), and return losses of
that shape, unreduced.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses, chosen_rewards, rejected_rewards), each of shape (pairs,), unreduced.

    Equation 7 of Rafailov et al. 2023 (arXiv 2305.18290): -log sigmoid(beta * (policy log-ratio -
    reference log-ratio)). `label_smoothing` is the assumed share of pairs whose labels are flipped
    (cDPO, Mitchell 2023). Rewards are beta * (policy - reference), without gradient.
    """
    pi_logratios = policy_chosen_logps - policy_rejected_logps
    ref_logratios = ref_chosen_logps - ref_rejected_logps
    logits = beta * (pi_logratios - ref_logratios)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


def ipo_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """Square distance to a margin of 1 / (2 beta) (Azar et al. 2023, equation 17).

    Log-ratios are policy - reference, per token of each completion.
    """
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


def simpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float, gamma: float) -> Tensor:
    """Reference-free: a margin gamma between the policy's log-probs per token (Meng et al. 2024,
    equation 6)."""
    return -logsigmoid(beta * (chosen_logps - rejected_logps) - gamma)


def mean_nll(logps: Sequence[Tensor]) -> Tensor:
    """Return the mean negative log-likelihood per completion token: a scalar, in nats.

    `logps` are the per-token log-probabilities of each completion. Every token weighs the same, as
    in supervised fine-tuning.
    """
    return -torch.cat(list(logps)).mean()
