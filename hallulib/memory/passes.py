"""One pass of each way to hold a policy and a reference, run on fake tensors or on a real model.

The functions that train are called once, as they are in the middle of training; nothing here knows
what they allocate. Everything runs alike on a real model and on a fake one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from peft import PeftModel
from transformers import PretrainedConfig

from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.logprobs import completion_logps, sum_completions
from hallulib.dpo.prefix_sharing import enable_prefix_sharing
from hallulib.dpo.train import measure_pairs
from hallulib.errors import HallulibError
from hallulib.generation import GenerationBatch, choose_tokens
from hallulib.memory.skeleton import (
    as_on_cuda,
    build_skeleton,
    make_fake_mode,
    quiet,
    swap_for_fake,
)
from hallulib.memory.tracker import StorageTracker, Trace, follow_model
from hallulib.models import attach_adapter, fold_adapter, load_base_model
from hallulib.recipe import Recipe
from hallulib.scoring import pad_rows, score_completions, unwrap_model
from hallulib.sft import measure_tokens
from hallulib.training import make_optimizer


@dataclass(frozen=True)
class Strategy:
    """What a pass runs and keeps in memory.

    `runs`: an SFT step, a DPO step, a reference pass, or sampling. `reference`: where a DPO step
    has its reference from: a second model on the card ("model") or in host memory ("host"), a
    second adapter on the same model ("adapter"), or log-probabilities stored before ("cache").
    `quantization` None takes the recipe's.
    """

    name: str
    title: str
    runs: Literal["sft", "dpo", "reference", "generation"]
    reference: Literal["model", "host", "adapter", "cache"] = "cache"
    quantization: Literal["none", "nf4", "int8"] | None = None

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.runs in ("sft", "dpo")

    @property
    def passes(self) -> int:
        """Forward passes that a step costs, with checkpointing: forward, recomputation, backward
        (two thirds of one without weights to train, counted as one), and a reference if it is run.
        """
        if not self.trains:
            return 1
        return 3 + (self.runs == "dpo" and self.reference != "cache")


_ALL = (
    Strategy("sft", "SFT", "sft"),
    Strategy("dual_model", "two models, unquantised", "dpo", "model", "none"),
    Strategy("dual_8bit", "two models, int8", "dpo", "model", "int8"),
    Strategy("dual_4bit", "two models, NF4", "dpo", "model", "nf4"),
    Strategy("reference_on_cpu", "reference model in host memory", "dpo", "host"),
    Strategy("adapter_copy", "one model, adapter copied", "dpo", "adapter"),
    Strategy("cached_reference_pass1", "cached reference, pass 1: reference", "reference"),
    Strategy("cached_reference_pass2", "cached reference, pass 2: training", "dpo"),
    Strategy("generation", "sampling summaries", "generation"),
)
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}


def find_strategy(name: str) -> Strategy:
    """Return the strategy of that name. Raises HallulibError when there is none."""
    if name not in STRATEGIES:
        raise HallulibError(
            f"There is no strategy '{name}'.", f"Use one of {', '.join(STRATEGIES)}."
        )
    return STRATEGIES[name]


@dataclass(frozen=True)
class StepShape:
    """`rows` (SFT, sampling) or pairs (DPO) of a micro-batch, each of `tokens` with `completion` of
    them scored. `shared`: prompts run once per pair."""

    rows: int
    tokens: int
    completion: int
    shared: bool = False


def trace_strategy(
    config: PretrainedConfig, recipe: Recipe, plan: Strategy, shape: StepShape, on_cuda: bool
) -> Trace:
    """Trace one pass of `plan` in the middle of training, on fake tensors, with the recipe's
    quantisation; `on_cuda` as a GPU's kernels would.

    Raises whatever the model's own code raises where it cannot run on fake tensors.
    """
    skeletons = [build_skeleton(config, recipe, 2 if plan.reference == "adapter" else 1)]
    if plan.reference == "model":
        skeletons.append(build_skeleton(config, recipe))
    mode, vocabulary = make_fake_mode(), config.get_text_config().vocab_size
    with quiet(), StorageTracker(vocabulary, on_cuda) as tracker:
        for skeleton in skeletons:
            swap_for_fake(skeleton, mode, tracker)
            follow_model(tracker, skeleton)
        with as_on_cuda() if on_cuda else nullcontext():
            _run_pass(tracker, plan, skeletons, recipe, shape)
    return tracker.trace


def trace_real(recipe: Recipe, plan: Strategy, shape: StepShape) -> Trace:
    """Run one pass of `plan` on the recipe's real model and follow it with the same tracker."""
    count = 2 if plan.reference == "model" else 1
    models = [attach_adapter(load_base_model(recipe), recipe) for _ in range(count)]
    if plan.reference == "adapter":
        models[0].add_adapter("reference", models[0].peft_config["default"])
        models[0].set_adapter("default")
    with StorageTracker(models[0].config.get_text_config().vocab_size) as tracker:
        for model in models:
            follow_model(tracker, model)
        _run_pass(tracker, plan, models, recipe, shape)
    return tracker.trace


def _run_pass(
    tracker: StorageTracker, plan: Strategy, models: list[PeftModel], recipe: Recipe,
    shape: StepShape,
) -> None:  # fmt: skip
    """Run one pass on `models`, the policy and a reference model if there is one, as tracked."""
    policy = models[0]
    for model in models:
        model.train(plan.trains and model is policy)
        if model is not policy:
            model.requires_grad_(False)
        if shape.shared:
            enable_prefix_sharing(unwrap_model(model))
    batch = make_rows(shape) if plan.runs == "sft" else make_pairs(shape)
    if not plan.trains:
        tracker.start_phase("forward")
        if plan.runs == "generation":
            return _sample_last_token(policy, recipe, shape)
        return _run_reference(policy, batch)

    def loss() -> torch.Tensor:
        if plan.runs == "sft":
            return sft_loss(policy, batch)
        if plan.reference in ("model", "adapter"):
            tracker.start_phase("reference")
            policy.set_adapter("reference" if plan.reference == "adapter" else "default")
            _run_reference(models[-1], batch)
            policy.set_adapter("default")
            tracker.start_phase("forward")
        logps = completion_logps(policy, batch)
        return measure_pairs(logps, batch, recipe.dpo, True, recipe.dpo.sft_weight)[0]

    section = recipe.sft if plan.runs == "sft" else recipe.dpo
    optimizer = make_optimizer(policy.parameters(), section.learning_rate, section.weight_decay)
    train_once(tracker, policy, optimizer, loss, section.gradient_accumulation > 1)


def make_rows(shape: StepShape) -> dict[str, torch.Tensor]:
    """Return an SFT batch: input_ids and completion_mask (rows, tokens)."""
    row = ([1] * (shape.tokens - shape.completion), [2] * shape.completion)
    input_ids, mask = pad_rows([row] * shape.rows, 0)
    return {"input_ids": input_ids, "completion_mask": mask}


def make_pairs(shape: StepShape) -> dict[str, torch.Tensor]:
    """Return a DPO batch of pairs with completions of equal length, and their stored reference."""
    prompt, completion = [1] * (shape.tokens - shape.completion), [2] * shape.completion
    pairs = [TokenPair(prompt, completion, completion)] * shape.rows
    return collate_pairs(pairs, 0, shape.shared)


def sft_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the SFT loss, a scalar, as `hallulib.sft` computes it."""
    scores = score_completions(model, batch["input_ids"], batch["completion_mask"])
    return measure_tokens(*scores)[0]


@torch.no_grad()
def _run_reference(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """A forward pass that keeps nothing; its result, a few numbers, is like those in the batch."""
    sum_completions(completion_logps(model, batch))


@torch.no_grad()
def _sample_last_token(model: PeftModel, recipe: Recipe, shape: StepShape) -> None:
    """Read prompts and take the last step of sampling, when the cache of keys and values is full.

    `shape.rows` summaries at a time, `shape.completion` new tokens each.
    """
    samples = min(recipe.pairs.samples_per_note, shape.rows)
    prompts = [[1] * (shape.tokens - shape.completion)] * max(1, shape.rows // samples)
    names = SimpleNamespace(eos_token_id=1, pad_token_id=0)
    with fold_adapter(model):
        batch = GenerationBatch(model, names, prompts, samples, shape.completion)
        logits = batch.read_prompts()
        mask = batch.build_mask()
        draw = torch.zeros(len(prompts), samples)
        ids = choose_tokens(logits, recipe.pairs.temperature, draw)
        del logits
        last = shape.completion - 1
        for layer in batch.cache.layers:  # the steps between need no more than the last one
            layer.length += last * samples
        logits = batch.read_step(ids, mask, batch.lengths + last, last)
        choose_tokens(logits, recipe.pairs.temperature, draw)


def train_once(
    tracker: StorageTracker, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor], accumulates: bool = False,
) -> None:  # fmt: skip
    """Run a step as it is in the middle of training: optimiser states are there, and, where
    gradients accumulate over micro-batches, so are gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def label_state() -> None:
        for parameter in trained:
            if parameter.grad is not None:
                tracker.follow(parameter.grad, "gradients")
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor):
                    tracker.follow(value, "optimiser_states")

    tracker.start_phase("first update")
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    label_state()
    optimizer.step()
    label_state()
    optimizer.zero_grad(set_to_none=not accumulates)
    tracker.start_phase("forward")
    value = loss()
    tracker.start_phase("backward")
    value.backward()
    del value
    label_state()
    tracker.start_phase("update")
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
