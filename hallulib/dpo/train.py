"""Sequential DPO: one model in memory, trained against log-probabilities stored before."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from hallulib.adapters import save_adapter
from hallulib.dpo import gates
from hallulib.dpo.batching import load_pairs
from hallulib.dpo.guardrail import BEST_FOLDER, STEP_FILE, Guardrail
from hallulib.dpo.logprobs import choose_layout
from hallulib.dpo.reference import ReferenceCache
from hallulib.dpo.step import Arm
from hallulib.dpo.trainer import SequentialDPOTrainer
from hallulib.files import write_text_atomic
from hallulib.metrics_log import METRICS_FILE, MetricsLog, ValidationPatience
from hallulib.models import load_policy, load_tokenizer
from hallulib.processes import count_processes, is_main_process
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage
from hallulib.training import find_best_checkpoint, find_last_checkpoint, train_to_end


@dataclass(frozen=True)
class DpoResult:
    """What one arm made. `metrics` are the eval_* and guardrail/* values of the adapter kept."""

    adapter: Path
    metrics: dict[str, float]
    reference_key: str
    notes: dict[str, Any] = field(default_factory=dict)


def load_dpo_result(run: Run) -> DpoResult:
    """Read the result of a finished DPO back from the run."""
    notes = run.manifest["stages"]["dpo"]["notes"]
    return DpoResult(run.path("dpo/adapter"), notes["metrics"], notes["reference_key"], notes)


@stage("dpo", load=load_dpo_result, parallel=True)
def train_dpo(recipe: Recipe, run: Run) -> DpoResult:
    """Train the SFT adapter further with DPO plus `dpo.sft_weight` times the SFT term.

    Writes dpo/adapter and dpo/metrics.jsonl. The adapter saved is that of the last step, not the
    one of the lowest validation loss: that loss keeps falling while the policy breaks, so choosing
    by it would only look careful. The best by that loss stays beside the last in checkpoints. With
    `dpo.guardrail_patience` it is the best by what the guardrail saw the policy write, with
    `dpo.validation_patience` the best by that loss.
    Raises GateFailed when the reference is not this policy's, or gradients go astray.
    """
    arm = Arm("dpo", preference=True, sft_weight=recipe.dpo.sft_weight)
    return train_arm(recipe, run, arm, run.path("dpo"), run.checkpoint_dir("dpo", recipe))


def train_arm(recipe: Recipe, run: Run, arm: Arm, folder: Path, checkpoints: Path) -> DpoResult:
    """Train one arm, or resume it; writes `folder`/adapter and `folder`/metrics.jsonl.

    Arms differ in the loss only: pairs, their order, steps and gates are the same.
    """
    tokenizer = load_tokenizer(recipe)
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=True)
    gates.check_single_adapter(policy)
    gates.check_adapter_file(policy, run.require("sft/adapter"))
    cache = ReferenceCache.open(run.require("reference"), recipe.model, policy, tokenizer)
    train, dropped = load_pairs(run, "train", tokenizer, recipe.model)
    validation, _ = load_pairs(run, "validation", tokenizer, recipe.model)
    gates.check_pairs(train + validation)
    pad_id = tokenizer.pad_token_id
    rows = recipe.reference.spot_check_rows
    differs = cache.spot_check(policy, train, pad_id, rows, recipe.seed)
    layout = choose_layout(policy, train, pad_id, recipe.dpo.prefix_sharing, recipe.model.dtype)
    print(layout)
    last = find_last_checkpoint(checkpoints)
    if last:
        gates.check_checkpoint_reference(last, cache.key)
    trainer = SequentialDPOTrainer(
        policy, recipe, arm, checkpoints, cache, (train, validation), tokenizer.pad_token_id,
        layout.shared,
    )  # fmt: skip
    log = _add_callbacks(trainer, run, tokenizer)
    report = trainer.check_gates()
    train_to_end(trainer)
    kept = _keep_adapter(trainer, log, run.require("sft/adapter"))
    if is_main_process():
        save_adapter(policy, folder / "adapter", recipe)
        write_text_atomic(folder / METRICS_FILE, (checkpoints / METRICS_FILE).read_text("utf-8"))
    notes = report | {
        "metrics": log.values_at(kept, "eval_", "guardrail/"),
        "reference_key": cache.key,
        "spot_check_nats": differs,
        "prompts_shared": layout.shared,
        "processes": count_processes(),
        "steps": trainer.state.global_step,
        "kept_step": kept,
        "best_step": _read_step(find_best_checkpoint(checkpoints)),
        "pairs": len(train),
        "dropped": dropped,
    }
    return DpoResult(folder / "adapter", notes["metrics"], cache.key, notes)


def _add_callbacks(
    trainer: SequentialDPOTrainer, run: Run, tokenizer: PreTrainedTokenizerBase
) -> MetricsLog:
    recipe, name = trainer.recipe, trainer.arm.name
    tensorboard = run.path(f"tensorboard/{name}")
    log = MetricsLog(
        Path(trainer.args.output_dir),
        tensorboard if recipe.dpo.report_to == "tensorboard" else None,
        name,
    )
    trainer.add_callback(log)
    if recipe.dpo.guardrail_notes:
        notes = pd.read_parquet(run.require("data/validation.parquet"))
        trainer.add_callback(Guardrail(trainer.policy, recipe, tokenizer, notes, log))
    if recipe.dpo.validation_patience:
        trainer.add_callback(ValidationPatience(log, recipe.dpo.validation_patience))
    return log


def _keep_adapter(trainer: SequentialDPOTrainer, log: MetricsLog, start: Path) -> int:
    """Put the adapter that is to be saved on the policy; returns the step it was trained to.

    `start` is the adapter of step 0, which is kept when nothing got better.
    """
    checkpoints, section = Path(trainer.args.output_dir), trainer.recipe.dpo
    if section.guardrail_patience and section.guardrail_notes:
        best = checkpoints / BEST_FOLDER
        step = json.loads((best / STEP_FILE).read_text("utf-8"))["step"]
    elif section.validation_patience:
        evaluations = [row for row in log.rows if "eval_loss" in row]
        step = min(evaluations, key=lambda row: row["eval_loss"])["step"]
        best = checkpoints / f"checkpoint-{step}" if step else start
    else:
        return trainer.state.global_step
    trainer.policy.load_adapter(str(best), "default", is_trainable=True)
    return step


def _read_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
