"""Preference losses as pure functions of 1-D tensors. Nothing of ours is imported here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (losses, chosen_rewards, rejected_rewards), each of shape (pairs,), unreduced.

    The inputs are summed log-probabilities of completions in nats, shape (pairs,). Equation 7 of
    Rafailov et al. 2023 (arXiv 2305.18290): -log sigmoid(beta * (policy log-ratio - reference
    log-ratio)). `label_smoothing` is the assumed share of pairs whose labels are flipped (cDPO,
    Mitchell 2023). Rewards are beta * (policy - reference), without gradient.
    """
    pi_logratios = policy_chosen_logps - policy_rejected_logps
    ref_logratios = ref_chosen_logps - ref_rejected_logps
    logits = beta * (pi_logratios - ref_logratios)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


def mean_nll(logps: Sequence[Tensor]) -> Tensor:
    """Return the mean negative log-likelihood per completion token: a scalar, in nats.

    `logps` are the per-token log-probabilities of each completion. Every token weighs the same, as
    in supervised fine-tuning.
    """
    return -torch.cat(list(logps)).mean()


@dataclass(frozen=True)
class PairLogps:
    """What every loss may look at, each of shape (pairs,).

    Summed log-probabilities of the completions in nats under policy and reference, and the number
    of their tokens. Reference-free losses leave the reference aside.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_logratios(self) -> Tensor:
        return self.policy_chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        return self.policy_rejected_logps - self.ref_rejected_logps

    @property
    def delta(self) -> Tensor:
        """Log-ratio of the chosen minus that of the rejected: the margin before beta."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def mean_delta(self) -> Tensor:
        """The same per token of each side."""
        chosen = self.chosen_logratios / self.chosen_tokens
        return chosen - self.rejected_logratios / self.rejected_tokens


@dataclass(frozen=True)
class LossSettings:
    """beta: strength of the pull to the reference (IPO's tau). label_smoothing: assumed share of
    flipped pairs. gamma: the margin that SimPO asks for."""

    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.5


def sigmoid_loss(pair: PairLogps, settings: LossSettings) -> Tensor:
    """DPO (Rafailov et al. 2023), with label smoothing cDPO (Mitchell 2023): :func:`dpo_loss`."""
    return dpo_loss(
        pair.policy_chosen_logps, pair.policy_rejected_logps, pair.ref_chosen_logps,
        pair.ref_rejected_logps, settings.beta, settings.label_smoothing,
    )[0]  # fmt: skip


def robust_loss(pair: PairLogps, settings: LossSettings) -> Tensor:
    """DPO's loss freed from the bias of flipped labels (Chowdhury et al. 2024, equation 6)."""
    logits, noise = settings.beta * pair.delta, settings.label_smoothing
    return (-(1 - noise) * logsigmoid(logits) + noise * logsigmoid(-logits)) / (1 - 2 * noise)


def hinge_loss(pair: PairLogps, settings: LossSettings) -> Tensor:
    """A margin of 1 is enough (SLiC, Zhao et al. 2023; RSO, Liu et al. 2023)."""
    return relu(1 - settings.beta * pair.delta)


def ipo_loss(pair: PairLogps, settings: LossSettings) -> Tensor:
    """Square distance to a margin of 1 / (2 beta) per token (Azar et al. 2023, equation 17)."""
    return (pair.mean_delta - 1 / (2 * settings.beta)) ** 2


def sigmoid_norm_loss(pair: PairLogps, settings: LossSettings) -> Tensor:
    """DPO on log-ratios per token, so that length earns nothing."""
    return -logsigmoid(settings.beta * pair.mean_delta)


def simpo_loss(pair: PairLogps, settings: LossSettings) -> Tensor:
    """Reference-free: log-prob per token, and a margin gamma (Meng et al. 2024, equation 6)."""
    chosen = pair.policy_chosen_logps / pair.chosen_tokens
    rejected = pair.policy_rejected_logps / pair.rejected_tokens
    return -logsigmoid(settings.beta * (chosen - rejected) - settings.gamma)


def orpo_loss(pair: PairLogps, settings: LossSettings) -> Tensor:
    """Reference-free: beta times the odds-ratio loss (Hong et al. 2024, equation 7).

    ORPO is this plus the SFT term with weight 1 (`dpo.sft_weight`).
    """
    chosen = _log_odds(pair.policy_chosen_logps / pair.chosen_tokens)
    rejected = _log_odds(pair.policy_rejected_logps / pair.rejected_tokens)
    return -settings.beta * logsigmoid(chosen - rejected)


def _log_odds(logp: Tensor) -> Tensor:
    # A log-prob of exactly 0 has infinite odds; the clamp keeps the gradient a number.
    return logp - torch.log1p(-torch.exp(logp.clamp(max=-1e-6)))


# name in the recipe -> losses of shape (pairs,), unreduced
PREFERENCE_LOSSES: dict[str, Callable[[PairLogps, LossSettings], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
}
