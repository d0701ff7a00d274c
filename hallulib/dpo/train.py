"""Sequential DPO: one model in memory, trained against log-probabilities stored before."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hallulib.checkpoints import Log, Trained, load_trained, write_trained
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
from hallulib.run import Run, stage
from hallulib.training import Batch, Metrics, Task, move, train


class Arm(NamedTuple):
    """What is trained: the preference loss or not, and the weight of the SFT term on the chosen."""

    name: str
    preference: bool
    sft_weight: float


# The arms DPO is compared with.
ARMS = {
    "dpo_plain": Arm("dpo_plain", preference=True, sft_weight=0.0),
    "sft_on_chosen": Arm("sft_on_chosen", preference=False, sft_weight=1.0),
}


@dataclass(frozen=True)
class Start:
    """Where every arm starts: the SFT policy, and the pairs with their reference; all gates passed.

    `shared`: prompts run once for both completions. `notes`: what was found, for the manifest.
    """

    policy: PeftModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[TokenPair]
    validation: list[TokenPair]
    shared: bool
    notes: dict[str, Any]


class ArmResults(dict[str, Trained]):
    """Arm name -> its result; `notes` is what goes into the manifest."""

    @property
    def notes(self) -> dict[str, Any]:
        return {"arms": {name: result.notes for name, result in self.items()}}


def load_arms(run: Run) -> ArmResults:
    """Read the results of finished arms back from the run."""
    arms, root = run.manifest["stages"]["comparison"]["notes"]["arms"], run.path("dpo/arms")
    return ArmResults({name: Trained(root / name / "adapter", n) for name, n in arms.items()})


@stage("dpo", load=partial(load_trained, name="dpo"), parallel=True)
def train_dpo(recipe: Recipe, run: Run) -> Trained:
    """Train the SFT adapter further with DPO plus `dpo.sft_weight` times the SFT term.

    Writes dpo/adapter and dpo/metrics.jsonl. The adapter saved is that of the last step, not the
    one of the lowest validation loss: that loss keeps falling while the policy breaks, so choosing
    by it would only look careful. The best by that loss stays beside the last in checkpoints. With
    `dpo.guardrail_patience` it is the best by what the guardrail saw the policy write.
    Raises GateFailed when the reference is not this policy's, or gradients go astray.
    """
    arm = Arm("dpo", preference=True, sft_weight=recipe.dpo.sft_weight)
    checkpoints = run.checkpoint_dir("dpo", recipe)
    return train_arm(recipe, run, load_start(recipe, run), arm, run.path("dpo"), checkpoints)


@stage("comparison", load=load_arms, parallel=True)
def train_comparison_arms(recipe: Recipe, run: Run) -> ArmResults:
    """Train the arms of `dpo.comparison_arms`; writes dpo/arms/<arm>/{adapter, metrics.jsonl}.

    Start, pairs, their order, steps and gates are those of DPO, the loss is another. After an
    interruption every arm goes on at its last checkpoint.
    """
    root, checkpoints = run.path("dpo/arms"), run.checkpoint_dir("comparison", recipe)
    root.mkdir(parents=True, exist_ok=True)
    for old in root.iterdir() if is_main_process() else ():
        if old.name not in recipe.dpo.comparison_arms:
            shutil.rmtree(old)
    results, start = ArmResults(), None
    for name in recipe.dpo.comparison_arms:
        start = start or load_start(recipe, run)
        results[name] = train_arm(recipe, run, start, ARMS[name], root / name, checkpoints / name)
    return results


def load_start(recipe: Recipe, run: Run) -> Start:
    """Load policy, pairs and reference, and pass every gate that does not depend on the arm."""
    tokenizer, adapter = load_tokenizer(recipe), run.require("sft/adapter")
    policy = load_policy(recipe, adapter, trainable=True)
    gates.check_single_adapter(policy)
    tensors = gates.check_adapter_file(policy, adapter)
    disable_dropout(policy)
    pad_id, section = tokenizer.pad_token_id, recipe.reference
    cache = ReferenceCache.open(run.require("reference"), recipe.model, policy, tokenizer)
    pairs, report = load_pairs(run, "train", tokenizer, recipe.model)
    pairs = cache.add_reference(pairs)
    validation = cache.add_reference(load_pairs(run, "validation", tokenizer, recipe.model).pairs)
    gates.check_pairs(pairs + validation)
    differs = cache.spot_check(policy, pairs, pad_id, section.spot_check_rows, recipe.seed)
    layout = choose_layout(policy, pairs, pad_id, recipe.dpo.prefix_sharing, recipe.model.dtype)
    print(layout)
    notes = {
        "start_loss": measure_start(policy, pairs, pad_id, layout.shared, recipe),
        "lora_tensors": tensors,
        "reference_key": cache.key,
        "spot_check_nats": differs,
        "prompts_shared": layout.shared,
        "processes": count_processes(),
        "pairs": len(pairs),
        "dropped": report,
    }
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
    batch = move(batch, policy.device)
    policy.train()
    sums = sum_completions(completion_logps(policy, batch))
    references = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
    losses, chosen, rejected = dpo_loss(*sums.chunk(2), *references, recipe.dpo.beta)
    gates.check_start(losses, chosen - rejected, recipe.model.dtype)
    return losses.mean().item()


def train_arm(
    recipe: Recipe, run: Run, start: Start, arm: Arm, folder: Path, checkpoints: Path
) -> Trained:
    """Train one arm, or resume it; writes `folder`/adapter and `folder`/metrics.jsonl."""
    policy, section = start.policy, recipe.dpo
    policy.load_adapter(str(run.require("sft/adapter")), "default", is_trainable=True)
    board = run.path(f"tensorboard/{arm.name}") if section.report_to == "tensorboard" else None
    log = Log(checkpoints, board)
    notes = pd.read_parquet(run.require("data/validation.parquet")).to_dict("records")
    guardrail = Guardrail(
        policy, start.tokenizer, notes, section, recipe.evaluation.batch_size, log
    )
    longest = max(pair.length for pair in start.pairs)
    with explain_out_of_memory("dpo", longest, run.path("budget/dpo.json")):
        train(policy, make_task(start, arm, section), section, log, recipe.seed, guardrail)
    stops_early = section.guardrail_patience and section.guardrail_notes
    kept = guardrail.load_best() if stops_early else log.rows[-1]["step"]
    notes = start.notes | {
        "metrics": log.values_at(kept, "eval_", "guardrail/"),
        "steps": log.rows[-1]["step"],
        "kept_step": kept,
        "best_step": log.find_best_step(),
    }
    return write_trained(policy, log, folder, notes)


def make_task(start: Start, arm: Arm, section: DpoSection) -> Task:
    """Return an arm for the training loop.

    The rate is constant after the warm-up: step n is the same step whatever max_steps is.
    """
    pad_id = start.tokenizer.pad_token_id

    def collate(pairs: Sequence[TokenPair], training: bool) -> Batch:
        # Where the loss does not look at the rejected side it is not run: half the work.
        return collate_pairs(pairs, pad_id, start.shared, training and not arm.preference)

    def measure(
        model: torch.nn.Module, batch: Batch, token_weight: float
    ) -> tuple[Tensor, Metrics]:
        logps = model(completion_logps, batch)
        return measure_pairs(logps, batch, section, arm.preference, arm.sft_weight, token_weight)

    weights = {"dpo_loss": float(arm.preference), "sft_loss": arm.sft_weight}
    return Task(
        arm.name, start.pairs, start.validation, collate, measure, weights,
        "constant_with_warmup", start.notes["reference_key"],
    )  # fmt: skip


def measure_pairs(
    logps: Sequence[Tensor],
    batch: dict[str, Tensor],
    section: DpoSection,
    preference: bool,
    sft_weight: float,
    token_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
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
        losses, more = compare_sides(sums, batch, section)
        loss = loss + losses.mean() if preference else loss
        found |= {"dpo_loss": losses} | more
    metrics = {name: (values.detach().sum(), count) for name, values in found.items()}
    return loss, metrics | {"sft_loss": (nll.detach() * tokens, tokens)}


def compare_sides(
    sums: Tensor, batch: dict[str, Tensor], section: DpoSection
) -> tuple[Tensor, dict[str, Tensor]]:
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
    return losses, {
        "drift/chosen": drift[0],
        "drift/rejected": drift[1],
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/rejected": rejected,
    }
