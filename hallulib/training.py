"""What SFT and DPO share: the order of rows, the Trainer's settings, logging, exact resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from hallulib.adapters import save_adapter
from hallulib.errors import GateFailed
from hallulib.files import display_path
from hallulib.models import pick_device
from hallulib.processes import (
    count_processes,
    gather_from_all,
    is_main_process,
    process_rank,
    wait_for_all,
)
from hallulib.recipe import Recipe
from hallulib.recipe_sections import DpoSection, SftSection
from hallulib.watch import SlowStepWatch, TensorPeak, check_loss_is_a_number

STATE_FILE = "trainer_state.json"
WINDOW = 16  # batches sorted by length together: little padding, and still a random order


def draw_order(lengths: Sequence[int], batch_size: int, batches: int, seed: int) -> list[int]:
    """Return `batches * batch_size` row numbers, in the order in which they are trained on.

    Every row comes once before any comes again. Within a window of 16 batches rows are sorted by
    length, so that a batch holds rows of like length, and the batches are shuffled. The order is
    a pure function of its arguments: a resumed run, and every arm of a comparison, sees the same.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < batches * batch_size:
        rows = torch.randperm(len(lengths), generator=generator).tolist()
        whole = len(rows) - len(rows) % batch_size
        for start in range(0, whole, WINDOW * batch_size):
            window = rows[start : min(start + WINDOW * batch_size, whole)]
            window.sort(key=lambda row: lengths[row])
            cut = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
            for i in torch.randperm(len(cut), generator=generator).tolist():
                order += cut[i]
        order += rows[whole:]
    return order[: batches * batch_size]


def build_arguments(
    recipe: Recipe, section: SftSection | DpoSection, folder: Path, schedule: str
) -> TrainingArguments:
    """Return the settings of transformers.Trainer for one section of the recipe."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=section.max_steps,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        max_grad_norm=getattr(section, "max_grad_norm", 1.0),
        eval_strategy="steps",
        eval_steps=section.eval_steps,
        eval_on_start=find_last_checkpoint(folder) is None,
        save_strategy="steps",
        save_steps=section.save_steps,
        save_total_limit=section.keep_last + 1,  # and the best
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        seed=recipe.seed,
        use_cpu=pick_device(recipe) == "cpu",
        train_sampling_strategy="sequential",  # the rows come ordered, see draw_order
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=[],
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every LoRA tensor gets a gradient: a gate sees to it
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer wraps the model in DataParallel, unasked
    return args


class InForward(torch.nn.Module):
    """Runs any function of the policy within `forward`, the one call that DDP and FSDP wrap."""

    def __init__(self, policy: PeftModel) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(policy, *arguments)`."""
        return function(self.policy, *arguments)


class MeanTrainer(Trainer):
    """A Trainer whose metrics are means of sums, never gathered logits.

    A subclass gives `measure(model, batch) -> (loss, {name: (sum, count)})`, which calls the
    policy as `model(function, ...)`, and `total_loss`, the loss of many batches from the means of
    their metrics. The metrics of the steps since the last log go beside `loss`; those of the
    validation rows get "eval_". Each of n processes takes a share of the rows of a step, so they
    train as one does with n times the batch.
    """

    def __init__(
        self,
        policy: PeftModel,
        recipe: Recipe,
        args: TrainingArguments,
        rows: Sequence[dict[str, Any]],
        validation: Sequence[dict[str, Any]],
        collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
        length: Callable[[dict[str, Any]], int],
    ) -> None:
        micro_batches = args.max_steps * args.gradient_accumulation_steps
        lengths = [length(row) for row in rows]
        batch_size = args.train_batch_size * count_processes()
        order = draw_order(lengths, batch_size, micro_batches, args.seed)
        super().__init__(
            model=InForward(policy),
            args=args,
            train_dataset=[rows[i] for i in order],
            eval_dataset=sorted(validation, key=length),
            data_collator=collate,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(SlowStepWatch())
        self.policy, self.recipe, self.peak = policy, recipe, TensorPeak()
        self.sums: dict[str, list[float]] = {}
        # Losses are means over a micro-batch; the Trainer divides by their number.
        self.loss_is_scaled_for_ga = False

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, tuple[Any, int]]]:
        """Return the loss of a batch and its metrics as (sum, count)."""
        raise NotImplementedError

    def total_loss(self, means: dict[str, float]) -> float:
        """Return the loss over many batches from the means of their metrics."""
        raise NotImplementedError

    def weigh_tokens(self, count: int) -> float:
        """Return what a mean over `count` tokens of this process weighs among the processes.

        Each token then counts the same, however unevenly the processes share them.
        """
        if count_processes() == 1 or not self.model.training:
            return 1.0
        counts = gather_from_all(count)
        return count * len(counts) / sum(counts)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self.peak.watch(inputs, self.policy, self.optimizer):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, sums = self.measure(model, inputs)
        check_loss_is_a_number(loss.detach(), self.state.global_step)
        add_sums(self.sums, sums)
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= take_means(self.sums)
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Return and log the mean loss and metrics over the validation rows."""
        self.model.eval()
        sums: dict[str, list[float]] = {}
        share = self.eval_dataset[process_rank() :: count_processes()]
        size = self.args.per_device_eval_batch_size
        for batch in DataLoader(share, size, collate_fn=self.data_collator):
            add_sums(sums, self.measure(self.model, self._prepare_inputs(batch))[1])
        means = take_means(sums)
        means = {"loss": self.total_loss(means)} | means
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if is_main_process():  # the Trainer may ask each of them
            save_adapter(self.policy, output_dir or self.args.output_dir, self.recipe)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self.policy.load_adapter(str(resume_from_checkpoint), "default", is_trainable=True)

    def _move_model_to_device(self, model, device) -> None:
        """Nothing: load_base_model has put it there, and quantised weights must not be moved."""


def add_sums(sums: dict[str, list[float]], more: dict[str, tuple[Any, int]]) -> None:
    """Add (sum, count) entries in place."""
    for name, (value, count) in more.items():
        entry = sums.setdefault(name, [0.0, 0])
        entry[0] += float(value)
        entry[1] += count


def take_means(sums: dict[str, list[float]]) -> dict[str, float]:
    """Return sum / count per name, over all processes, and empty `sums`."""
    everywhere: dict[str, list[float]] = {}
    for found in gather_from_all(dict(sums)):
        add_sums(everywhere, found)
    sums.clear()
    return {name: total / max(count, 1) for name, (total, count) in everywhere.items()}


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint; one cut off while it was written does not count."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append((json.loads((path / STATE_FILE).read_text("utf-8"))["global_step"], path))
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def find_best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest validation loss, as the last one records it."""
    last = find_last_checkpoint(folder)
    if last is None:
        return None
    step = json.loads((last / STATE_FILE).read_text("utf-8"))["best_global_step"]
    best = folder / f"checkpoint-{step}"
    return best if best.is_dir() else last


def train_to_end(trainer: MeanTrainer) -> None:
    """Train, from the last complete checkpoint in the output folder if there is one."""
    folder = Path(trainer.args.output_dir)
    os.makedirs(folder, exist_ok=True)
    checkpoint = find_last_checkpoint(folder)
    wait_for_all()  # everybody resumes from the same one
    if checkpoint:
        print(f"resuming from {display_path(checkpoint)}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    wait_for_all()  # the last checkpoint is written
    if any(not p.isfinite().all() for p in trainer.policy.parameters() if p.requires_grad):
        raise GateFailed(
            "Training ended in weights that are not numbers.", "Lower the learning rate."
        )
