"""Loss and metrics of one step, from log-probabilities: the trainer calls this, and so does the
memory budget, on tensors without values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hallulib.dpo.logprobs import sum_completions
from hallulib.dpo.losses import PREFERENCE_LOSSES, LossSettings, PairLogps, mean_nll
from hallulib.recipe_sections import DpoSection

Metrics = dict[str, tuple[Tensor, int]]


@dataclass(frozen=True)
class Arm:
    """What is trained: the preference loss or not, and the weight of the SFT term on the chosen."""

    name: str
    preference: bool
    sft_weight: float


def measure_step(
    logps: Sequence[Tensor],
    batch: dict[str, Tensor],
    section: DpoSection,
    arm: Arm,
    token_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Return the loss of a batch, a scalar, and its metrics as name -> (sum, how many).

    `logps` are the per-token log-probs (nats) of each completion, chosen first. Where they stop
    after the chosen (SFT on the chosen, at half the work) there is no preference loss.
    `token_weight` makes tokens weigh the same across processes.
    """
    count = len(batch["ref_chosen_logps"])
    sums, nll = sum_completions(logps), mean_nll(logps[:count])
    tokens = int(batch["counts"][:count].sum())
    loss = arm.sft_weight * (nll * token_weight)
    # Rewards are relative to the reference whatever the loss, so that arms can be compared.
    chosen = section.beta * (sums[:count] - batch["ref_chosen_logps"])
    found = {"rewards/chosen": chosen, "logps/chosen": sums[:count]}
    if len(logps) > count:
        losses, more = _compare_sides(sums, batch, section)
        loss = loss + losses.mean() if arm.preference else loss
        found |= {"dpo_loss": losses} | more
    metrics = {name: (values.detach().sum(), count) for name, values in found.items()}
    return loss, metrics | {"sft_loss": (nll.detach() * tokens, tokens)}


def _compare_sides(
    sums: Tensor, batch: dict[str, Tensor], section: DpoSection
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the preference losses and what is watched beside them, all of shape (pairs,)."""
    count = len(sums) // 2
    pair = PairLogps(
        *sums.split(count), batch["ref_chosen_logps"], batch["ref_rejected_logps"],
        *batch["counts"].split(count),
    )  # fmt: skip
    settings = LossSettings(section.beta, section.label_smoothing, section.simpo_gamma)
    chosen = section.beta * pair.chosen_logratios.detach()
    rejected = section.beta * pair.rejected_logratios.detach()
    return PREFERENCE_LOSSES[section.loss](pair, settings), {
        "drift/chosen": pair.chosen_logratios / pair.chosen_tokens,
        "drift/rejected": pair.rejected_logratios / pair.rejected_tokens,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/rejected": pair.policy_rejected_logps,
    }
