"""Sequential DPO: one model in memory, trained against log-probabilities stored before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel

from hallulib.adapters import check_gradient_flow, save_adapter
from hallulib.dpo import gates
from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.guardrail import BEST_FOLDER, Guardrail
from hallulib.dpo.logprobs import CHECKED_PAIRS, choose_layout, completion_logps, sum_completions
from hallulib.dpo.losses import (
    PREFERENCE_LOSSES,
    LossSettings,
    PairLogps,
    dpo_loss,
    mean_nll,
)
from hallulib.dpo.reference_cache import ReferenceCache, load_pairs
from hallulib.models import load_policy, load_tokenizer
from hallulib.paths import write_text_atomic
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.stage import stage
from hallulib.training import (
    METRICS_FILE,
    MeanTrainer,
    MetricsLog,
    build_arguments,
    find_best_checkpoint,
    find_last_checkpoint,
    read_metrics,
    train_to_end,
)
from hallulib.watch import explain_out_of_memory


@dataclass(frozen=True)
class Arm:
    """What is trained: the preference loss or not, and the weight of the SFT term on the chosen."""

    name: str
    preference: bool
    sft_weight: float


@dataclass(frozen=True)
class DpoResult:
    """What one arm made. `metrics` are the last eval_* and guardrail/* values."""

    adapter: Path
    metrics: dict[str, float]
    reference_key: str
    notes: dict[str, Any] = field(default_factory=dict)


def load_dpo_result(run: Run) -> DpoResult:
    """Read the result of a finished DPO back from the run."""
    notes = run.manifest["stages"]["dpo"]["notes"]
    return DpoResult(run.path("dpo/adapter"), notes["metrics"], notes["reference_key"], notes)


@stage("dpo", load=load_dpo_result)
def train_dpo(recipe: Recipe, run: Run) -> DpoResult:
    """Train the SFT adapter further with DPO plus `dpo.sft_weight` times the SFT term.

    Writes dpo/adapter and dpo/metrics.jsonl. The adapter saved is that of the last step, not the
    one of the lowest validation loss: that loss keeps falling while the policy breaks, so choosing
    by it would only look careful. The best by that loss stays beside the last in checkpoints. With
    `dpo.guardrail_patience` it is the best by what the guardrail saw the policy write.
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
    cache = ReferenceCache.open(run.require("reference"), recipe, policy, tokenizer)
    train, dropped = load_pairs(run, "train", tokenizer, recipe.model.max_length)
    validation, _ = load_pairs(run, "validation", tokenizer, recipe.model.max_length)
    gates.check_pairs(train + validation)
    differs = cache.spot_check(policy, train, tokenizer.pad_token_id, recipe)
    layout = choose_layout(policy, train[:CHECKED_PAIRS], tokenizer.pad_token_id, recipe)
    print(layout)
    last = find_last_checkpoint(checkpoints)
    if last:
        gates.check_checkpoint_reference(last, cache.key)
    trainer = SequentialDPOTrainer(
        policy, recipe, arm, checkpoints, cache, (train, validation), tokenizer.pad_token_id,
        layout.shared,
    )  # fmt: skip
    tensorboard = run.path(f"tensorboard/{arm.name}")
    log = MetricsLog(
        checkpoints, tensorboard if recipe.dpo.report_to == "tensorboard" else None, arm.name
    )
    trainer.add_callback(log)
    if recipe.dpo.guardrail_notes:
        notes = pd.read_parquet(run.require("data/validation.parquet"))
        trainer.add_callback(Guardrail(recipe, tokenizer, notes, log))
    report = trainer.check_gates()
    train_to_end(trainer)
    best = checkpoints / BEST_FOLDER
    if best.exists():  # dpo.guardrail_patience is set
        policy.load_adapter(str(best), "default", is_trainable=True)
    save_adapter(policy, folder / "adapter", recipe)
    write_text_atomic(folder / METRICS_FILE, (checkpoints / METRICS_FILE).read_text("utf-8"))
    notes = report | {
        "metrics": last_metrics(folder / METRICS_FILE),
        "reference_key": cache.key,
        "spot_check_nats": differs,
        "prompts_shared": layout.shared,
        "steps": trainer.state.global_step,
        "best_step": int(find_best_checkpoint(checkpoints).name.rpartition("-")[2]),
        "pairs": len(train),
        "dropped": dropped,
    }
    return DpoResult(folder / "adapter", notes["metrics"], cache.key, notes)


def last_metrics(path: Path) -> dict[str, float]:
    """Return the last value of every eval_* and guardrail/* metric of a metrics.jsonl."""
    found: dict[str, float] = {}
    for row in read_metrics(path):
        found |= {k: v for k, v in row.items() if k.startswith(("eval_", "guardrail/"))}
    return found


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: the reference was computed without, and like must meet like."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


class SequentialDPOTrainer(MeanTrainer):
    """transformers.Trainer with the DPO loss against a cached reference: one pass a step."""

    def __init__(
        self,
        policy: PeftModel,
        recipe: Recipe,
        arm: Arm,
        checkpoints: Path,
        cache: ReferenceCache,
        pairs: tuple[Sequence[TokenPair], Sequence[TokenPair]],
        pad_id: int,
        shared: bool = False,
    ) -> None:
        disable_dropout(policy)
        self.arm, self.pad_id, self.shared, self.reference_key = arm, pad_id, shared, cache.key
        section = recipe.dpo
        self.loss_settings = LossSettings(
            section.beta, section.label_smoothing, section.simpo_gamma
        )
        train = join_reference(pairs[0], cache, chosen_only=not arm.preference)
        validation = join_reference(pairs[1], cache)
        # A constant rate after the warm-up: step n is the same step whatever max_steps is.
        args = build_arguments(recipe, recipe.dpo, checkpoints, "constant_with_warmup")
        self.longest = sorted(train, key=lambda row: -row["pair"].length)[: recipe.dpo.batch_size]
        super().__init__(
            policy, recipe, args, train, validation, self.collate,
            length=lambda row: row["pair"].length,
        )  # fmt: skip

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the batch of :func:`collate_pairs` with ref_*_logps (pairs,) beside it."""
        pairs, chosen_only = [row["pair"] for row in rows], rows[0]["chosen_only"]
        batch = collate_pairs(pairs, self.pad_id, self.shared, chosen_only)
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            batch[name] = torch.tensor([row[name] for row in rows])
        return batch

    def measure(self, model, batch):
        count = len(batch["ref_chosen_logps"])
        if len(batch["counts"]) == count:
            return self._measure_chosen(model, batch)
        logps = completion_logps(model, batch)
        sums = sum_completions(logps)
        pair = PairLogps(
            *sums.split(count), batch["ref_chosen_logps"], batch["ref_rejected_logps"],
            *batch["counts"].split(count),
        )  # fmt: skip
        losses = PREFERENCE_LOSSES[self.recipe.dpo.loss](pair, self.loss_settings)
        # Rewards are relative to the reference whatever the loss, so that arms can be compared.
        chosen = self.recipe.dpo.beta * pair.chosen_logratios.detach()
        rejected = self.recipe.dpo.beta * pair.rejected_logratios.detach()
        nll = mean_nll(logps[:count])
        loss = self.arm.sft_weight * nll + (losses.mean() if self.arm.preference else 0.0)
        found = {
            "dpo_loss": losses,
            "drift/chosen": pair.chosen_logratios / pair.chosen_tokens,
            "drift/rejected": pair.rejected_logratios / pair.rejected_tokens,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": sums[:count],
            "logps/rejected": sums[count:],
        }
        metrics = {name: (values.detach().sum(), count) for name, values in found.items()}
        return loss, metrics | {"sft_loss": (nll.detach() * count, count)}

    def _measure_chosen(self, model, batch):
        """SFT on the chosen needs no rejected row: half the work."""
        logps = completion_logps(model, batch)
        nll, sums, count = mean_nll(logps), sum_completions(logps).detach(), len(logps)
        chosen = self.recipe.dpo.beta * (sums - batch["ref_chosen_logps"])
        return self.arm.sft_weight * nll, {
            "rewards/chosen": (chosen.sum(), count),
            "logps/chosen": (sums.sum(), count),
            "sft_loss": (nll.detach() * count, count),
        }

    def check_gates(self) -> dict[str, Any]:
        """Run the longest batch once, forward and backward, before anything is trained.

        It is the memory probe, and it shows that the loss starts at ln 2 with every margin 0 and
        that gradients reach exactly the LoRA tensors. Returns what was found; raises GateFailed.
        """
        batch = self.collate([row | {"chosen_only": False} for row in self.longest])
        gates.check_scored_tokens(batch, [row["pair"] for row in self.longest])
        batch = self._prepare_inputs(batch)
        self.model.train()
        with explain_out_of_memory("dpo"):
            loss, _ = self.measure(self.model, batch)
            loss.backward()
        tensors = check_gradient_flow(self.model)
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            sums = sum_completions(completion_logps(self.model, batch))
        count = len(self.longest)
        references = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
        losses, chosen, rejected = dpo_loss(
            sums[:count], sums[count:], *references, self.recipe.dpo.beta
        )
        gates.check_start(losses, chosen - rejected, self.recipe.model.dtype)
        return {"start_loss": losses.mean().item(), "lora_tensors": tensors}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        gates.write_reference_key(output_dir or self.args.output_dir, self.reference_key)


def join_reference(
    pairs: Sequence[TokenPair], cache: ReferenceCache, chosen_only: bool = False
) -> list[dict[str, Any]]:
    """Put the cached reference beside each pair, as summed log-probs in nats.

    `chosen_only`: the rejected completion is not run, which halves the work of SFT on the chosen.
    """
    found = cache.lookup(pairs)
    return [
        {
            "pair": pair,
            "chosen_only": chosen_only,
            "ref_chosen_logps": float(chosen.sum()),
            "ref_rejected_logps": float(rejected.sum()),
        }
        for pair, (chosen, rejected) in zip(pairs, found, strict=True)
    ]
