"""The preference loss against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hallulib.dpo.losses import dpo_loss, ipo_loss, mean_nll, simpo_loss

pytestmark = pytest.mark.unit


def loss_of(chosen, rejected, ref_chosen, ref_rejected, **options):
    tensors = [torch.tensor([float(x)]) for x in (chosen, rejected, ref_chosen, ref_rejected)]
    return [value.item() for value in dpo_loss(*tensors, **options)]


def test_a_policy_equal_to_its_reference_has_loss_ln_2_and_no_rewards():
    assert loss_of(-7, -9, -7, -9, beta=0.3) == pytest.approx([math.log(2), 0, 0])


def test_the_loss_of_a_moved_policy_is_minus_log_sigmoid_of_beta_times_the_margin():
    # chosen rose by 2 nats, rejected fell by 3: margin 0.5 * (2 + 3) = 2.5
    loss, chosen, rejected = loss_of(-5, -12, -7, -9, beta=0.5)
    assert loss == pytest.approx(math.log(1 + math.exp(-2.5)), rel=1e-6)
    assert (chosen, rejected) == pytest.approx((1.0, -1.5))


def test_swapping_the_sides_turns_the_margin_around():
    loss, *_ = loss_of(-12, -5, -9, -7, beta=0.5)
    assert loss == pytest.approx(math.log(1 + math.exp(2.5)), rel=1e-6)


def test_label_smoothing_mixes_the_loss_with_that_of_the_flipped_pair():
    straight = math.log(1 + math.exp(-2.5))
    flipped = math.log(1 + math.exp(2.5))
    loss, *_ = loss_of(-5, -12, -7, -9, beta=0.5, label_smoothing=0.1)
    assert loss == pytest.approx(0.9 * straight + 0.1 * flipped, rel=1e-6)


def test_huge_margins_stay_finite():
    losses, _, _ = dpo_loss(
        torch.tensor([4000.0, -4000.0]), torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=1.0
    )
    assert losses.tolist() == pytest.approx([0.0, 4000.0])


def test_losses_come_per_pair_and_rewards_carry_no_gradient():
    policy = torch.randn(3, requires_grad=True)
    losses, chosen, rejected = dpo_loss(policy, policy * 0.5, policy.detach(), policy.detach(), 0.1)
    assert losses.shape == (3,) and losses.requires_grad
    assert not chosen.requires_grad and not rejected.requires_grad


def test_the_gradient_at_the_start_is_half_beta_in_opposite_directions():
    chosen = torch.tensor([-7.0], requires_grad=True)
    rejected = torch.tensor([-9.0], requires_grad=True)
    dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.2)[0].sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.1)
    assert rejected.grad.item() == pytest.approx(0.1)


def test_the_sft_term_is_the_mean_over_all_completion_tokens():
    logps = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    assert mean_nll(logps).item() == pytest.approx(2.0)


def test_ipo_is_the_square_distance_to_its_margin():
    # Per token the chosen rose by 1 nat and the rejected fell by 1; 1 / (2 beta) = 5.
    losses = ipo_loss(torch.tensor([1.0]), torch.tensor([-1.0]), beta=0.1)
    assert losses.tolist() == pytest.approx([(2 - 5) ** 2])


def test_simpo_asks_for_a_margin_between_log_probs_per_token():
    losses = simpo_loss(torch.tensor([-2.0]), torch.tensor([-3.0]), beta=2.0, gamma=0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1.5))])


def test_a_better_policy_has_a_lower_loss():
    chosen = torch.tensor([-3.0, -2.9, -2.0])  # ever likelier
    rest = torch.full((3,), -3.0)
    for losses in (
        dpo_loss(chosen, rest, rest, rest, 0.1)[0],
        ipo_loss(chosen - rest, torch.zeros(3), 0.1),
        simpo_loss(chosen, rest, 2.0, 0.5),
    ):
        assert losses[0] > losses[1] > losses[2]
