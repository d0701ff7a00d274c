"""The losses beside TRL's own code, on the same tensors: values and gradients."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from hallulib.dpo.losses import dpo_loss, ipo_loss, mean_nll, simpo_loss

pytestmark = pytest.mark.unit

BETA, GAMMA = 0.3, 0.7


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


@pytest.fixture
def batch():
    """(per-token log-probs with a gradient, completion mask, reference sums): 3 chosen first."""
    torch.manual_seed(1)
    mask = torch.zeros(6, 9, dtype=torch.long)  # six rows of nine tokens
    for row, (start, length) in enumerate([(3, 6), (2, 4), (4, 2), (3, 3), (2, 7), (4, 5)]):
        mask[row, start : start + length] = 1
    logps = -torch.rand(6, 8) * 3 * mask[:, 1:]
    return logps.requires_grad_(), mask, -torch.rand(6) * 12


def sides_of(logps, mask, reference):
    """(chosen, rejected) of summed log-probs, of the reference's, and of the tokens' numbers."""
    sums, counts = logps.sum(1), mask[:, 1:].sum(1)
    return sums.split(3), reference.split(3), counts.split(3)


def ask_trl(loss_type, logps, mask, reference):
    """The loss that DPOTrainer computes from a model that gives these log-probs."""
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
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:3],
        "ref_rejected_logps": reference[3:],
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def assert_equal_with_gradient(ours, theirs, logps):
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (ours, theirs)]
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_the_dpo_loss_is_that_of_trl_and_so_is_its_gradient(trl, batch):
    sums, references, _ = sides_of(*batch)
    ours = dpo_loss(*sums, *references, BETA)[0].mean()
    assert_equal_with_gradient(ours, ask_trl("sigmoid", *batch), batch[0])


def test_the_ipo_loss_is_that_of_trl(trl, batch):
    ratios = [(s - r) / t for s, r, t in zip(*sides_of(*batch), strict=True)]
    assert_equal_with_gradient(ipo_loss(*ratios, BETA).mean(), ask_trl("ipo", *batch), batch[0])


def test_the_sft_term_is_that_of_trl(trl, batch):
    logps, mask, _ = batch
    chosen = [row[kept.bool()] for row, kept in zip(logps[:3], mask[:3, 1:], strict=True)]
    assert_equal_with_gradient(mean_nll(chosen), ask_trl("sft", *batch), logps)


def test_the_simpo_loss_is_that_of_trl(trl, batch):
    from trl.experimental.cpo import CPOTrainer

    sums, _, tokens = sides_of(*batch)
    means = [total / count for total, count in zip(sums, tokens, strict=True)]
    trainer = SimpleNamespace(
        beta=BETA, simpo_gamma=GAMMA, alpha=0.0, label_smoothing=0.0, loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs = CPOTrainer.cpo_loss(trainer, *means)[0].mean()
    assert_equal_with_gradient(simpo_loss(*means, BETA, GAMMA).mean(), theirs, batch[0])
