"""Sequential DPO: one model in memory, trained against log-probabilities stored before."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hallulib.checkpoints import Log, write_trained
from hallulib.dpo import gates
from hallulib.dpo.batching import TokenPair, collate_pairs, load_pairs
from hallulib.dpo.guardrail import Guardrail
from hallulib.dpo.logprobs import choose_layout, completion_logps, sum_completions
from hallulib.dpo.losses import dpo_loss, ipo_loss, mean_nll, simpo_loss
from hallulib.dpo.reference import ReferenceCache
from hallulib.meter import explain_out_of_memory
from hallulib.models import load_policy, load_tokenizer
from hallulib.processes import count_processes, is_main_process
from hallulib.recipe import Recipe
from hallulib.recipe_sections import DpoSection
from hallulib.run import Result, Run, stage
from hallulib.training import Batch, Metrics, Task, move, train

# Beside DPO: with the preference loss or not, and the weight of the SFT term on the chosen side.
ARMS = {"dpo_plain": (True, 0.0), "sft_on_chosen": (False, 1.0)}


@dataclass(frozen=True)
class Start:
    """Where every arm starts: the SFT policy, and the pairs with their reference; all gates passed.
    `shared`: prompts run once for both completions."""

    policy: PeftModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[TokenPair]
    validation: list[TokenPair]
    shared: bool
    notes: dict[str, Any]


@stage("dpo", parallel=True)
def train_dpo(recipe: Recipe, run: Run) -> Result:
    """Train the SFT adapter further with DPO plus `dpo.sft_weight` times the SFT term.

    Writes dpo/adapter and dpo/metrics.jsonl. The adapter saved is that of the last step, not the
    one of the lowest validation loss: that loss keeps falling while the policy breaks. With
    `dpo.guardrail_patience` it is the best by what the guardrail saw the policy write.
    Raises GateFailed when the reference is not this policy's, or gradients go astray.
    """
    return train_arm(recipe, run, load_start(recipe, run), "dpo")


@stage("comparison", parallel=True)
def train_comparison_arms(recipe: Recipe, run: Run) -> Result:
    """Train the arms of `dpo.comparison_arms`; writes dpo/arms/<arm>/{adapter, metrics.jsonl}.

    Start, pairs, their order, steps and gates are those of DPO, the loss is another. After an
    interruption every arm goes on at its last checkpoint. Notes: {"arms": {arm: its notes}}.
    """
    root, arms = run.path("dpo/arms"), recipe.dpo.comparison_arms
    root.mkdir(parents=True, exist_ok=True)
    for old in root.iterdir() if is_main_process() else ():
        if old.name not in arms:
            shutil.rmtree(old)
    start = load_start(recipe, run) if arms else None
    return Result(root, {"arms": {n: train_arm(recipe, run, start, n).notes for n in arms}})


def load_start(recipe: Recipe, run: Run) -> Start:
    """Load policy, pairs and reference, and pass every gate that does not depend on the arm."""
    tokenizer, adapter = load_tokenizer(recipe), run.require("sft/adapter")
    policy = load_policy(recipe, adapter, trainable=True)
    gates.check_single_adapter(policy)
    tensors = gates.check_adapter_file(policy, adapter)
    disable_dropout(policy)
    pad_id, model = tokenizer.pad_token_id, recipe.model
    cache = ReferenceCache(run.require("reference"), model, policy, tokenizer)
    pairs, report = load_pairs(run, "train", tokenizer, model)
    pairs = cache.add_reference(pairs)
    validation = cache.add_reference(load_pairs(run, "validation", tokenizer, model)[0])
    gates.check_pairs(pairs + validation)
    rows = recipe.reference.spot_check_rows
    differs = cache.spot_check(policy, pairs, pad_id, rows, recipe.seed)
    layout = choose_layout(policy, pairs, pad_id, recipe.dpo.prefix_sharing, model.dtype)
    print(f"prompts shared: {layout.shared} ({layout.reason})")
    notes = {
        "start_loss": measure_start(policy, pairs, pad_id, layout.shared, recipe),
        "lora_tensors": tensors, "reference_key": cache.key, "spot_check_nats": differs,
        "prompts_shared": layout.shared, "processes": count_processes(), "pairs": len(pairs),
        "dropped": report,
    }  # fmt: skip
    return Start(policy, tokenizer, pairs, validation, layout.shared, notes)


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: the reference was computed without, and like must meet like."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


@torch.no_grad()
def measure_start(
    policy: PeftModel, pairs: Sequence[TokenPair], pad_id: int, shared: bool, recipe: Recipe
) -> float:
    """Return the DPO loss of the longest pairs before the first step: ln 2, or GateFailed."""
    longest = sorted(pairs, key=lambda pair: -pair.length)[: recipe.dpo.batch_size]
    batch = collate_pairs(longest, pad_id, shared)
    gates.check_scored_tokens(batch, longest)
    batch = move(batch, policy)
    policy.train()
    sums = sum_completions(completion_logps(policy, batch))
    references = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
    losses, chosen, rejected = dpo_loss(*sums.chunk(2), *references, recipe.dpo.beta)
    gates.check_start(losses, chosen - rejected, recipe.model.dtype)
    return losses.mean().item()


def train_arm(recipe: Recipe, run: Run, start: Start, name: str) -> Result:
    """Train one arm, "dpo" or one of ARMS, or resume it; writes its adapter and metrics.jsonl."""
    policy, section = start.policy, recipe.dpo
    folder, checkpoints = run.path("dpo"), run.checkpoint_dir("dpo", recipe)
    if name in ARMS:
        folder = run.path(f"dpo/arms/{name}")
        checkpoints = run.checkpoint_dir("comparison", recipe) / name
    policy.load_adapter(str(run.require("sft/adapter")), "default", is_trainable=True)
    board = run.path(f"tensorboard/{name}") if section.report_to == "tensorboard" else None
    log, size = Log(checkpoints, board), recipe.evaluation.batch_size
    notes = pd.read_parquet(run.require("data/validation.parquet")).to_dict("records")
    guardrail = Guardrail(policy, start.tokenizer, notes, section, size, log)
    longest = max(pair.length for pair in start.pairs)
    with explain_out_of_memory("dpo", longest, run.path("budget/dpo.json")):
        train(policy, make_task(start, name, section), section, log, recipe.seed, guardrail)
    stops_early = section.guardrail_patience and section.guardrail_notes
    kept = guardrail.load_best() if stops_early else log.rows[-1]["step"]
    return write_trained(policy, log, folder, kept, start.notes)


def make_task(start: Start, name: str, section: DpoSection) -> Task:
    """Return an arm, "dpo" or one of ARMS, for the training loop.

    The rate is constant after the warm-up: step n is the same step whatever max_steps is.
    """
    preference, sft_weight = ARMS.get(name, (True, section.sft_weight))
    pad_id, key = start.tokenizer.pad_token_id, start.notes["reference_key"]

    def collate(pairs: Sequence[TokenPair], training: bool) -> Batch:
        # Where the loss does not look at the rejected side it is not run: half the work.
        return collate_pairs(pairs, pad_id, start.shared, training and not preference)

    def measure(model: torch.nn.Module, batch: Batch, weight: float) -> tuple[Tensor, Metrics]:
        logps = model(completion_logps, batch)
        return measure_pairs(logps, batch, section, preference, sft_weight, weight)

    weights = {"dpo_loss": float(preference), "sft_loss": sft_weight}
    schedule = "constant_with_warmup"
    return Task(name, start.pairs, start.validation, collate, measure, weights, schedule, key)


def measure_pairs(
    logps: Sequence[Tensor], batch: Batch, section: DpoSection, preference: bool,
    sft_weight: float, token_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """Return the loss of a batch, a scalar, and its metrics as name -> (sum, how many).

    `logps` are the per-token log-probs (nats) of each completion, chosen first. Where they stop
    after the chosen (SFT on the chosen, at half the work) there is no preference loss.
    `token_weight` makes tokens weigh the same across micro-batches and processes.
    """
    count = len(batch["ref_chosen_logps"])
    sums, nll = sum_completions(logps), mean_nll(logps[:count])
    tokens = int(batch["counts"][:count].sum())
    loss = sft_weight * (nll * token_weight)
    # Rewards are relative to the reference whatever the loss, so that arms can be compared.
    chosen = section.beta * (sums[:count] - batch["ref_chosen_logps"])
    found = {"rewards/chosen": chosen, "logps/chosen": sums[:count]}
    if len(logps) > count:
        found |= compare_sides(sums, batch, section)
        loss = loss + found["dpo_loss"].mean() if preference else loss
    metrics = {name: (values.detach().sum(), count) for name, values in found.items()}
    return loss, metrics | {"sft_loss": (nll.detach() * tokens, tokens)}


def compare_sides(sums: Tensor, batch: Batch, section: DpoSection) -> dict[str, Tensor]:
    """Return the preference losses and what is watched beside them, all of shape (pairs,)."""
    (chosen, rejected), (chosen_tokens, rejected_tokens) = sums.chunk(2), batch["counts"].chunk(2)
    references = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, *references, section.beta, section.label_smoothing
    )
    drift = (chosen - references[0]) / chosen_tokens, (rejected - references[1]) / rejected_tokens
    if section.loss == "ipo":
        losses = ipo_loss(*drift, section.beta)
    elif section.loss == "simpo":
        means = chosen / chosen_tokens, rejected / rejected_tokens
        losses = simpo_loss(*means, section.beta, section.simpo_gamma)
    return {
        "dpo_loss": losses,
        "drift/chosen": drift[0],
        "drift/rejected": drift[1],
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/rejected": rejected,
    }
