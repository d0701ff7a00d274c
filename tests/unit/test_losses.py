"""The preference loss against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hallulib.dpo.losses import (
    PREFERENCE_LOSSES,
    LossSettings,
    PairLogps,
    dpo_loss,
    mean_nll,
)

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


def pair_of(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens=2, rejected_tokens=4):
    values = (chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)
    return PairLogps(*(torch.tensor([float(value)]) for value in values))


def log_odds(mean_logp):
    return math.log(math.exp(mean_logp) / (1 - math.exp(mean_logp)))


# chosen rose by 2 nats over 2 tokens, rejected fell by 4 over 4: delta 6, per token 2
MOVED = (-4, -12, -6, -8)


@pytest.mark.parametrize(
    ("name", "settings", "by_hand"),
    [
        ("sigmoid", LossSettings(0.5), math.log(1 + math.exp(-3))),
        ("hinge", LossSettings(0.1), 0.4),
        ("hinge", LossSettings(0.5), 0.0),
        ("ipo", LossSettings(0.1), (2 - 5) ** 2),
        ("sigmoid_norm", LossSettings(0.5), math.log(1 + math.exp(-1))),
        # policy per token: -2 and -3; beta (-2 + 3) - gamma
        ("simpo", LossSettings(2.0, gamma=0.5), math.log(1 + math.exp(-1.5))),
        ("orpo", LossSettings(0.5), 0.5 * math.log(1 + math.exp(log_odds(-3) - log_odds(-2)))),
        (
            "robust",
            LossSettings(0.5, label_smoothing=0.1),
            (0.9 * math.log(1 + math.exp(-3)) - 0.1 * math.log(1 + math.exp(3))) / 0.8,
        ),
    ],
)
def test_each_loss_is_the_value_worked_out_by_hand(name, settings, by_hand):
    losses = PREFERENCE_LOSSES[name](pair_of(*MOVED), settings)
    assert losses.shape == (1,)
    assert losses.item() == pytest.approx(by_hand, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_better_policy_has_no_higher_loss_and_gradients_are_numbers(name):
    settings = LossSettings(0.1, label_smoothing=0.1 if name == "robust" else 0.0)
    chosen = torch.tensor([-6.0, -1e-9], requires_grad=True)
    rest = [torch.tensor([value, value]) for value in (-8.0, -6.0, -8.0, 2.0, 4.0)]
    loss = PREFERENCE_LOSSES[name](PairLogps(chosen, *rest), settings)
    loss.sum().backward()
    assert chosen.grad.isfinite().all()
    assert chosen.grad[0] < 0


def test_simpo_and_orpo_do_not_look_at_the_reference():
    for name in ("simpo", "orpo"):
        loss = PREFERENCE_LOSSES[name]
        other = pair_of(*MOVED[:2], -99, -1)
        assert loss(pair_of(*MOVED), LossSettings(0.1)) == loss(other, LossSettings(0.1))


def test_the_recipe_offers_exactly_the_losses_there_are():
    from typing import get_args

    from hallulib.recipe import DpoSection

    assert set(get_args(DpoSection.model_fields["loss"].annotation)) == set(PREFERENCE_LOSSES)
