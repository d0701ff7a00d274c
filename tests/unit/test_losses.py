"""The losses against values worked out by hand, and beside TRL's own code: values and gradients."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from hallulib.dpo.losses import dpo_loss, ipo_loss, mean_nll, simpo_loss

pytestmark = pytest.mark.unit

BETA, GAMMA = 0.3, 0.7
STRAIGHT, FLIPPED = math.log(1 + math.exp(-2.5)), math.log(1 + math.exp(2.5))


@pytest.mark.parametrize(
    ("sums", "options", "expected"),
    [
        # a policy equal to its reference: ln 2, and no rewards
        ((-7, -9, -7, -9), {"beta": 0.3}, (math.log(2), 0, 0)),
        # chosen rose by 2 nats, rejected fell by 3: margin 0.5 * (2 + 3) = 2.5
        ((-5, -12, -7, -9), {"beta": 0.5}, (STRAIGHT, 1.0, -1.5)),
        # swapping the sides turns the margin around
        ((-12, -5, -9, -7), {"beta": 0.5}, (FLIPPED, -1.5, 1.0)),
        # label smoothing mixes the loss with that of the flipped pair
        ((-5, -12, -7, -9), {"beta": 0.5, "label_smoothing": 0.1},
         (0.9 * STRAIGHT + 0.1 * FLIPPED, 1.0, -1.5)),
        # huge margins stay finite
        ((4000, 0, 0, 0), {"beta": 1}, (0, 4000, 0)),
        ((-4000, 0, 0, 0), {"beta": 1}, (4000, -4000, 0)),
    ],
)  # fmt: skip
def test_the_dpo_loss_and_its_rewards_are_those_worked_out_by_hand(sums, options, expected):
    found = dpo_loss(*(torch.tensor([float(x)]) for x in sums), **options)
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-6)


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


def test_ipo_simpo_and_the_sft_term_are_those_worked_out_by_hand():
    # Per token the chosen rose by 1 nat and the rejected fell by 1; 1 / (2 beta) = 5.
    assert ipo_loss(torch.tensor([1.0]), torch.tensor([-1.0]), 0.1).item() == pytest.approx(9)
    losses = simpo_loss(torch.tensor([-2.0]), torch.tensor([-3.0]), beta=2.0, gamma=0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1.5))])
    # The mean over all completion tokens, not over completions.
    assert mean_nll([torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]).item() == pytest.approx(2)


def test_a_better_policy_has_a_lower_loss():
    chosen = torch.tensor([-3.0, -2.9, -2.0])  # ever likelier
    rest = torch.full((3,), -3.0)
    for losses in (
        dpo_loss(chosen, rest, rest, rest, 0.1)[0],
        ipo_loss(chosen - rest, torch.zeros(3), 0.1),
        simpo_loss(chosen, rest, 2.0, 0.5),
    ):
        assert losses[0] > losses[1] > losses[2]


def ask_trl(loss_type, logps, mask, reference):
    """The loss that TRL's trainers compute from a model that gives these log-probs."""
    from trl import DPOTrainer

    def model(**_):
        flat = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=flat, mean_logits=flat, is_top1=flat.bool())

    alone = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=alone, aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        loss_types=[loss_type], loss_weights=[1.0], beta=BETA, label_smoothing=0.0,
        use_weighting=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask),
        "completion_mask": mask, "ref_chosen_logps": reference[:3],
        "ref_rejected_logps": reference[3:],
    }  # fmt: skip
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def ask_trl_for_simpo(means):
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        beta=BETA, simpo_gamma=GAMMA, alpha=0.0, label_smoothing=0.0, loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    return CPOTrainer.cpo_loss(trainer, *means)[0].mean()


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sft", "simpo"])
def test_each_loss_is_that_of_trl_and_so_is_its_gradient(name):
    pytest.importorskip("trl")
    torch.manual_seed(1)
    mask = torch.zeros(6, 9, dtype=torch.long)  # six rows of nine tokens, three chosen first
    for row, (start, length) in enumerate([(3, 6), (2, 4), (4, 2), (3, 3), (2, 7), (4, 5)]):
        mask[row, start : start + length] = 1
    logps, reference = -torch.rand(6, 8) * 3 * mask[:, 1:], -torch.rand(6) * 12
    logps.requires_grad_()
    scored = mask[:, 1:]
    sums, references, counts = logps.sum(1).split(3), reference.split(3), scored.sum(1).split(3)
    ratios = [(s - r) / n for s, r, n in zip(sums, references, counts, strict=True)]
    means = [s / n for s, n in zip(sums, counts, strict=True)]
    ours = {
        "sigmoid": lambda: dpo_loss(*sums, *references, BETA)[0],
        "ipo": lambda: ipo_loss(*ratios, BETA),
        "sft": lambda: mean_nll([logps[row][scored[row].bool()] for row in range(3)]),
        "simpo": lambda: simpo_loss(*means, BETA, GAMMA),
    }[name]().mean()
    theirs = ask_trl_for_simpo(means) if name == "simpo" else ask_trl(name, logps, mask, reference)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    grads = [torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (ours, theirs)]
    assert grads[0].abs().max() > 0
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7)
