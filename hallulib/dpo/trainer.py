"""The DPO loss against log-probabilities stored before, in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from hallulib.adapters import check_gradient_flow
from hallulib.dpo import gates
from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.logprobs import completion_logps, sum_completions
from hallulib.dpo.losses import dpo_loss
from hallulib.dpo.reference import ReferenceCache
from hallulib.dpo.step import Arm, measure_step
from hallulib.processes import is_main_process
from hallulib.recipe import Recipe
from hallulib.training import MeanTrainer, build_arguments
from hallulib.watch import explain_out_of_memory


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
        return collate_pairs(pairs, self.pad_id, self.shared, chosen_only)

    def measure(self, model, batch):
        logps = model(completion_logps, batch)
        tokens = int(batch["counts"][: len(batch["ref_chosen_logps"])].sum())
        return measure_step(logps, batch, self.recipe.dpo, self.arm, self.weigh_tokens(tokens))

    def total_loss(self, means: dict[str, float]) -> float:
        preference = means["dpo_loss"] if self.arm.preference else 0.0
        return preference + self.arm.sft_weight * means["sft_loss"]

    def check_gates(self) -> dict[str, Any]:
        """Run the longest batch once, forward and backward, before anything is trained.

        It is the memory probe, and it shows that the loss starts at ln 2 with every margin 0 and
        that gradients reach exactly the LoRA tensors. Returns what was found; raises GateFailed.
        """
        batch = self.collate([row | {"chosen_only": False} for row in self.longest])
        gates.check_scored_tokens(batch, [row["pair"] for row in self.longest])
        batch = self._prepare_inputs(batch)
        self.model.train()
        with explain_out_of_memory("dpo", self.longest[0]["pair"].length):
            loss, _ = self.measure(self.model, batch)
            loss.backward()
        tensors = check_gradient_flow(self.policy)
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            sums = sum_completions(completion_logps(self.policy, batch))
        count = len(self.longest)
        references = (batch["ref_chosen_logps"], batch["ref_rejected_logps"])
        losses, chosen, rejected = dpo_loss(
            sums[:count], sums[count:], *references, self.recipe.dpo.beta
        )
        gates.check_start(losses, chosen - rejected, self.recipe.model.dtype)
        return {"start_loss": losses.mean().item(), "lora_tensors": tensors}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if is_main_process():
            gates.write_reference_key(output_dir or self.args.output_dir, self.reference_key)


def join_reference(
    pairs: Sequence[TokenPair], cache: ReferenceCache, chosen_only: bool = False
) -> list[dict[str, Any]]:
    """Put the cached reference beside each pair, as summed log-probs in nats.

    `chosen_only`: the rejected completion is not run, which halves the work of SFT on the chosen.
    """
    return [{"pair": pair, "chosen_only": chosen_only} for pair in cache.add_reference(pairs)]
