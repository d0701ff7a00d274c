"""Traces one pass of a strategy on fake tensors: who is loaded, what runs, what lives when."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import PretrainedConfig

from hallulib import generation
from hallulib.memory import steps
from hallulib.memory.fake_model import (
    as_on_cuda,
    build_skeleton,
    make_fake_mode,
    swap_for_fake,
    upcast_as_peft_does,
)
from hallulib.memory.steps import StepShape
from hallulib.memory.strategies import Strategy
from hallulib.models import attach_adapter, fold_adapter, load_base_model
from hallulib.recipe import Recipe
from hallulib.tracker import StorageTracker, Trace, follow_model


@dataclass(frozen=True)
class Levers:
    """What a recipe does not say: on a GPU or a CPU; the optimiser, by transformers' name ("" is
    its default; large states of a paged one are counted in the host's memory, from where they visit
    the card); NF4 with or without double quantisation; peft's fp32 upcast, which this project does
    not use."""

    on_cuda: bool = True
    optimizer: str = ""
    double_quant: bool = True
    upcast: bool = False


def trace_strategy(
    config: PretrainedConfig, recipe: Recipe, plan: Strategy, shape: StepShape, levers: Levers
) -> Trace:
    """Trace one pass of `plan` in the middle of training. The recipe's quantisation is the plan's.

    Raises whatever the model's own code raises where it cannot run on fake tensors.
    """
    copies = 2 if plan.reference == "adapter" else 1
    skeletons = [build_skeleton(config, recipe, copies, levers.double_quant)]
    if plan.reference == "model":
        skeletons.append(build_skeleton(config, recipe, 1, levers.double_quant))
    mode, vocabulary = make_fake_mode(), config.get_text_config().vocab_size
    with quiet(), no_collection(), StorageTracker(vocabulary, levers.on_cuda) as tracker:
        models = [_load(skeleton, mode, tracker, levers.upcast) for skeleton in skeletons]
        with as_on_cuda() if levers.on_cuda else nullcontext():
            run_pass(tracker, plan, models, recipe, shape, levers.optimizer)
    return tracker.trace


def trace_real(recipe: Recipe, plan: Strategy, shape: StepShape) -> Trace:
    """Run one pass of `plan` on the recipe's real model and follow it with the same tracker."""
    policy = attach_adapter(load_base_model(recipe), recipe)
    models = [policy]
    if plan.reference == "adapter":
        policy.add_adapter("reference", policy.peft_config["default"])
        policy.set_adapter("default")
    if plan.reference == "model":
        models.append(attach_adapter(load_base_model(recipe), recipe))
    vocabulary = policy.config.get_text_config().vocab_size
    with no_collection(), StorageTracker(vocabulary) as tracker:
        for model in models:
            follow_model(tracker, model)
        run_pass(tracker, plan, models, recipe, shape)
    return tracker.trace


def _load(skeleton: PeftModel, mode, tracker: StorageTracker, upcast: bool) -> PeftModel:
    swap_for_fake(skeleton, mode, tracker)
    if upcast:
        upcast_as_peft_does(skeleton)
    follow_model(tracker, skeleton)
    return skeleton


def run_pass(
    tracker: StorageTracker, plan: Strategy, models: list[PeftModel], recipe: Recipe,
    shape: StepShape, optimizer: str = "",
) -> None:
    """Run one pass of `plan` on `models` (policy, and a reference model if there is one), real or
    fake, within the tracker."""
    policy = models[0]
    if shape.shared:
        for model in models:
            steps.share_prompts(model)
    for model in models[1:]:
        model.eval().requires_grad_(False)
    policy.train(plan.trains)
    if plan.runs == "generation":
        tracker.start_phase("forward")
        return generate_once(policy, recipe, shape)
    batch = (steps.make_rows if plan.runs == "sft" else steps.make_pairs)(shape)
    if plan.runs == "reference":
        tracker.start_phase("forward")
        return steps.reference_logps(policy, batch, shape.head)

    def compute_loss() -> torch.Tensor:
        if plan.runs == "sft":
            return steps.sft_loss(policy, batch, shape.head)
        _run_reference(plan, models, batch, shape.head)
        return steps.dpo_loss(policy, batch, recipe, shape.head)

    section = recipe.sft if plan.runs == "sft" else recipe.dpo
    accumulates = section.gradient_accumulation > 1
    steps.train_once(
        tracker, policy, steps.make_optimizer(policy, optimizer), compute_loss, accumulates
    )


def _run_reference(plan: Strategy, models: list[PeftModel], batch: steps.Batch, head: str) -> None:
    """The reference's forward pass, where it is run in the step; its result is a few numbers."""
    if plan.reference == "model":
        steps.reference_logps(models[1], batch, head)
    elif plan.reference == "adapter":
        models[0].set_adapter("reference")
        steps.reference_logps(models[0], batch, head)
        models[0].set_adapter("default")


@torch.no_grad()
def generate_once(model: PeftModel, recipe: Recipe, shape: StepShape) -> None:
    """Read prompts and take the last step of sampling, when the cache of keys and values is full.

    `shape.rows` summaries at a time, `shape.completion` new tokens each.
    """
    samples = min(recipe.pairs.samples_per_note, shape.rows)
    prompts = [[1] * (shape.tokens - shape.completion)] * max(1, shape.rows // samples)
    names = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    with fold_adapter(model):
        batch = generation.GenerationBatch(model, names, prompts, samples, shape.completion)
        logits = batch.read_prompts()
        mask = batch.build_mask()
        draw = torch.zeros(len(prompts), samples)
        ids = generation.choose_tokens(logits, recipe.pairs.temperature, draw)
        del logits
        last = shape.completion - 1
        for layer in batch.cache.layers:  # the steps between need no more than the last one
            layer.length += last * samples
        logits = batch.read_step(ids, mask, batch.lengths + last, last)
        generation.choose_tokens(logits, recipe.pairs.temperature, draw)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block the libraries do not warn about what a fake run meets by design."""
    loggers = [logging.getLogger(n) for n in ("bitsandbytes", "torch._subclasses.fake_tensor")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def no_collection() -> Iterator[None]:
    """Within the block Python's collector of cycles does not run: what is freed is freed by
    counting references, so that a trace is the same each time (and faster)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
