"""One step of training, reference pass or generation: the functions that train, called once.

Everything here runs alike on a real model and on a fake one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax
from transformers import Trainer, TrainingArguments

from hallulib import scoring
from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.logprobs import completion_logps, sum_completions
from hallulib.dpo.prefix_sharing import enable_prefix_sharing
from hallulib.dpo.train import measure_pairs
from hallulib.recipe import Recipe
from hallulib.scoring import pad_rows, score_completions, unwrap_model
from hallulib.sft import measure_tokens
from hallulib.tracker import StorageTracker

HEADS = ("chunked", "completion", "full")
PAGED = "paged_states"  # label of what lies in the host's memory
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class StepShape:
    """`rows` (SFT) or pairs (DPO) of a micro-batch, each of `tokens` with `completion` of them
    scored, and how: `head` "chunked" (this project's), "completion" (all scored tokens at once) or
    "full" (every position, as trainers do by default). `shared`: prompts run once per pair."""

    rows: int
    tokens: int
    completion: int
    head: str = "chunked"
    shared: bool = False


def make_rows(shape: StepShape) -> Batch:
    """Return an SFT batch: input_ids and completion_mask (rows, tokens)."""
    row = ([1] * (shape.tokens - shape.completion), [2] * shape.completion)
    input_ids, mask = pad_rows([row] * shape.rows, 0)
    return {"input_ids": input_ids, "completion_mask": mask}


def make_pairs(shape: StepShape) -> Batch:
    """Return a DPO batch of pairs with completions of equal length, and their stored reference."""
    prompt, completion = [1] * (shape.tokens - shape.completion), [2] * shape.completion
    pairs = [TokenPair(prompt, completion, completion)] * shape.rows
    return collate_pairs(pairs, 0, shape.shared)


def sft_loss(model: torch.nn.Module, batch: Batch, head: str = "chunked") -> torch.Tensor:
    """Return the SFT loss, a scalar, as `hallulib.sft` computes it (or with another head)."""
    if head == "full":
        labels = batch["input_ids"].masked_fill(~batch["completion_mask"], -100)
        return model(input_ids=batch["input_ids"], labels=labels, use_cache=False).loss
    with chunks_for(head):
        scores = score_completions(model, batch["input_ids"], batch["completion_mask"])
    return measure_tokens(*scores)[0]


def pair_logps(model: torch.nn.Module, batch: Batch, head: str = "chunked") -> list[torch.Tensor]:
    """Return the per-token log-probabilities of every completion, with one of the heads."""
    if head != "full":
        with chunks_for(head):
            return completion_logps(model, batch)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    logps = log_softmax(logits.float(), -1).flatten(0, 1)
    scored = logps[batch["predictors"]].gather(1, batch["targets"][:, None])[:, 0]
    return list(scored.split(batch["counts"].tolist()))


def dpo_loss(
    model: torch.nn.Module, batch: Batch, recipe: Recipe, head: str = "chunked"
) -> torch.Tensor:
    """Return the DPO loss plus its SFT term, a scalar, as the trainer computes it."""
    logps = pair_logps(model, batch, head)
    return measure_pairs(logps, batch, recipe.dpo, True, recipe.dpo.sft_weight)[0]


@torch.no_grad()
def reference_logps(model: torch.nn.Module, batch: Batch, head: str = "chunked") -> torch.Tensor:
    """Return the summed log-probabilities of a reference: a forward pass that keeps nothing."""
    return sum_completions(pair_logps(model, batch, head))


@contextmanager
def chunks_for(head: str) -> Iterator[None]:
    """Within the block the head runs in this project's chunks, or ("completion") in one."""
    before = scoring.LOGITS_PER_CHUNK
    if head == "completion":
        scoring.LOGITS_PER_CHUNK = 2**62
    try:
        yield
    finally:
        scoring.LOGITS_PER_CHUNK = before


def share_prompts(model: torch.nn.Module) -> None:
    """Switch prefix sharing on, as `choose_layout` does where the layouts agree."""
    enable_prefix_sharing(unwrap_model(model))


def make_optimizer(model: torch.nn.Module, name: str = "") -> torch.optim.Optimizer:
    """Return the optimiser that transformers' Trainer would make; "" is its default."""
    settings = {"optim": name} if name else {}
    args = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, **settings)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    return kind(trained, **options)


def train_once(
    tracker: StorageTracker,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor],
    accumulates: bool,
) -> None:
    """Run a step as it is in the middle of training: optimiser states are there, and, where
    gradients accumulate over micro-batches, so are gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    tracker.start_phase("first update")
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    label_training_state(tracker, optimizer, trained)
    optimizer.step()
    label_training_state(tracker, optimizer, trained)
    optimizer.zero_grad(set_to_none=not accumulates)
    tracker.start_phase("forward")
    value = loss()
    tracker.start_phase("backward")
    value.backward()
    del value
    label_training_state(tracker, optimizer, trained)
    tracker.start_phase("update")
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tracker.finish()


def label_training_state(
    tracker: StorageTracker, optimizer: torch.optim.Optimizer, trained: list[torch.nn.Parameter]
) -> None:
    """Tell the tracker which storages are gradients and which are optimiser states."""
    for parameter in trained:
        if parameter.grad is not None:
            tracker.follow(parameter.grad, "gradients")
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor):
                paged = tracker.on_cuda and pages_out(optimizer, parameter, value)
                tracker.follow(value, PAGED if paged else "optimiser_states")


def pages_out(
    optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, state: torch.Tensor
) -> bool:
    """Whether bitsandbytes keeps this state in memory that the host shares with the card, which
    PyTorch's allocator does not see and which makes room when it is short: as in its
    `get_state_buffer`, states of 100,000 elements or more, of its paged optimisers."""
    paged = getattr(optimizer, "is_paged", False)
    return paged and state.shape == parameter.shape and parameter.numel() >= 1e5
