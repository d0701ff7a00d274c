"""One pass of each way to hold a policy and a reference, on fake tensors or on a real model.

The functions that train are called as in the middle of training; nothing here knows what they
allocate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.logprobs import completion_logps, sum_completions
from hallulib.dpo.prefix_sharing import enable_prefix_sharing
from hallulib.dpo.train import measure_pairs
from hallulib.generation import GenerationBatch, choose_tokens
from hallulib.memory.skeleton import as_on_cuda, build_skeleton, swap_for_fake
from hallulib.memory.tracker import StorageTracker, Trace, follow_model
from hallulib.models import attach_adapter, fold_adapter, load_base_model
from hallulib.recipe import Recipe
from hallulib.scoring import pad_rows, score_completions
from hallulib.sft import measure_tokens
from hallulib.training import make_optimizer

INT8_LOG = logging.getLogger("bitsandbytes.autograd._functions")  # a warning a layer and step


class Strategy(NamedTuple):
    """What a pass runs and keeps. `runs` is the recipe's section for it; `reference` a second model
    on the card or in host memory, a second adapter on the same model, or stored log-probs;
    `quantization` None takes the recipe's."""

    title: str
    runs: Literal["sft", "dpo", "reference", "pairs"]
    reference: Literal["model", "host", "adapter", "cache"] = "cache"
    quantization: Literal["none", "nf4", "int8"] | None = None

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.runs in ("sft", "dpo")


STRATEGIES: dict[str, Strategy] = {
    "sft": Strategy("SFT", "sft"),
    "dual_model": Strategy("two models, unquantised", "dpo", "model", "none"),
    "dual_8bit": Strategy("two models, int8", "dpo", "model", "int8"),
    "dual_4bit": Strategy("two models, NF4", "dpo", "model", "nf4"),
    "reference_on_cpu": Strategy("reference model in host memory", "dpo", "host"),
    "adapter_copy": Strategy("one model, adapter copied", "dpo", "adapter"),
    "cached_reference_pass1": Strategy("cached reference, pass 1: reference", "reference"),
    "cached_reference_pass2": Strategy("cached reference, pass 2: training", "dpo"),
    "generation": Strategy("sampling summaries", "pairs"),
}


class StepShape(NamedTuple):
    """`rows` (SFT, sampling) or pairs (DPO) of a micro-batch, each of `tokens` with `completion` of
    them scored. `shared`: prompts run once per pair."""

    rows: int
    tokens: int
    completion: int
    shared: bool = False


def runs_on_cuda(recipe: Recipe) -> bool:
    """Whether the recipe asks for a GPU, or leaves the choice and one is here."""
    device = recipe.model.device
    return device == "cuda" or device == "auto" and torch.cuda.is_available()


def trace_pass(
    recipe: Recipe, plan: Strategy, shape: StepShape, config: PretrainedConfig | None = None
) -> Trace:
    """Trace one pass of `plan` in the middle of training: of a model of this shape on fake tensors,
    as the kernels of the recipe's device would run it, or without `config` of the real model.
    Raises whatever the model's own code raises on tensors without values."""
    models = [
        build_skeleton(config, recipe)
        if config
        else attach_adapter(load_base_model(recipe), recipe)
        for _ in range(2 if plan.reference == "model" else 1)
    ]
    for model in models[1:]:
        model.eval().requires_grad_(False)
    if plan.reference == "adapter":
        models[0].add_adapter("reference", models[0].peft_config["default"])
        models[0].set_adapter("default")
    models[0].train(plan.trains)
    on_cuda = bool(config) and runs_on_cuda(recipe)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # masks and positions keep their values
    tracker = StorageTracker(models[0].config.get_text_config().vocab_size, on_cuda)
    with patch.object(INT8_LOG, "disabled", True), tracker:
        for model in models:
            if shape.shared:
                enable_prefix_sharing(model.get_base_model())
            if config:
                swap_for_fake(model, mode, tracker)
            follow_model(tracker, model)
        with as_on_cuda() if on_cuda else nullcontext():
            _run_pass(tracker, plan, models, recipe, shape)
    return tracker.trace


def _run_pass(
    tracker: StorageTracker, plan: Strategy, models: list[PeftModel], recipe: Recipe,
    shape: StepShape,
) -> None:  # fmt: skip
    policy = models[0]
    prompt, completion = [1] * (shape.tokens - shape.completion), [2] * shape.completion
    if plan.runs == "sft":
        batch = pad_rows([(prompt, completion)] * shape.rows, 0)
    else:
        pairs = [TokenPair(prompt, completion, completion)] * shape.rows
        batch = collate_pairs(pairs, 0, shape.shared)
    if not plan.trains:
        tracker.start_phase("forward")
        if plan.runs == "pairs":
            return _sample_last_token(policy, recipe, shape)
        return _run_reference(policy, batch)

    def loss() -> torch.Tensor:
        if plan.runs == "sft":
            return measure_tokens(*score_completions(policy, *batch))[0]
        if plan.reference in ("model", "adapter"):
            tracker.start_phase("reference")
            policy.set_adapter("reference" if plan.reference == "adapter" else "default")
            _run_reference(models[-1], batch)
            policy.set_adapter("default")
            tracker.start_phase("forward")
        logps = completion_logps(policy, batch)
        return measure_pairs(logps, batch, recipe.dpo, True, recipe.dpo.sft_weight)[0]

    section = getattr(recipe, plan.runs)
    optimizer = make_optimizer(policy.parameters(), section.learning_rate, section.weight_decay)
    train_once(tracker, policy, optimizer, loss, section.gradient_accumulation > 1)


@torch.no_grad()
def _run_reference(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """A forward pass that keeps nothing; its result, a few numbers, is like those in the batch."""
    sum_completions(completion_logps(model, batch))


@torch.no_grad()
def _sample_last_token(model: PeftModel, recipe: Recipe, shape: StepShape) -> None:
    """Read prompts and take the last step of sampling, when the cache of keys and values is full:
    `shape.rows` summaries at a time, `shape.completion` new tokens each."""
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
