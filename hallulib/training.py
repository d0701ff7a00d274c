"""What SFT and DPO share: the order of rows, the Trainer's settings, logging, exact resume."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hallulib.adapters import save_adapter
from hallulib.errors import GateFailed, ModelError
from hallulib.models import pick_device
from hallulib.paths import display_path, write_text_atomic
from hallulib.recipe import DpoSection, Recipe, SftSection
from hallulib.watch import SlowStepWatch, check_loss_is_a_number

METRICS_FILE = "metrics.jsonl"
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
    """Return the settings of transformers.Trainer for one section of the recipe.

    Raises ModelError under a launcher with several processes: that is not supported yet.
    """
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
        save_total_limit=2,  # the best and the last
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
    )
    if args.world_size > 1:
        raise ModelError(
            f"Training was launched in {args.world_size} processes, and one is supported so far.",
            "Start it with plain python, and choose the GPU with CUDA_VISIBLE_DEVICES.",
        )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer wraps the model in DataParallel, unasked
    return args


class MeanTrainer(Trainer):
    """A Trainer whose metrics are means of sums, never gathered logits.

    A subclass gives `measure(model, batch) -> (loss, {name: (sum, count)})`. The metrics of the
    steps since the last log go beside `loss`; those of the validation rows get "eval_".
    """

    def __init__(
        self,
        model: torch.nn.Module,
        recipe: Recipe,
        args: TrainingArguments,
        rows: Sequence[dict[str, Any]],
        validation: Sequence[dict[str, Any]],
        collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
        length: Callable[[dict[str, Any]], int],
    ) -> None:
        micro_batches = args.max_steps * args.gradient_accumulation_steps
        lengths = [length(row) for row in rows]
        order = draw_order(lengths, args.train_batch_size, micro_batches, args.seed)
        super().__init__(
            model=model,
            args=args,
            train_dataset=[rows[i] for i in order],
            eval_dataset=sorted(validation, key=length),
            data_collator=collate,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(SlowStepWatch())
        self.recipe = recipe
        self.sums: dict[str, list[float]] = {}
        # Losses are means over a micro-batch; the Trainer divides by their number.
        self.loss_is_scaled_for_ga = False

    def measure(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, tuple[Any, int]]]:
        """Return the loss of a batch and its metrics as (sum, count)."""
        raise NotImplementedError

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
        for batch in self.get_eval_dataloader(eval_dataset):
            loss, found = self.measure(self.model, self._prepare_inputs(batch))
            weight = next(iter(found.values()))[1]
            add_sums(sums, {"loss": (loss * weight, weight), **found})
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in take_means(sums).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_adapter(self.model, output_dir or self.args.output_dir, self.recipe)


def add_sums(sums: dict[str, list[float]], more: dict[str, tuple[Any, int]]) -> None:
    """Add (sum, count) entries in place."""
    for name, (value, count) in more.items():
        entry = sums.setdefault(name, [0.0, 0])
        entry[0] += float(value)
        entry[1] += count


def take_means(sums: dict[str, list[float]]) -> dict[str, float]:
    """Return sum / count per name and empty `sums`."""
    means = {name: total / max(count, 1) for name, (total, count) in sums.items()}
    sums.clear()
    return means


class MetricsLog(TrainerCallback):
    """Writes every logged value to metrics.jsonl and TensorBoard, and shows a progress bar.

    On resume, rows past the checkpoint are dropped, so that the file reads as if there had been
    no interruption.
    """

    def __init__(self, folder: Path, tensorboard: Path | None, label: str) -> None:
        self.file = folder / METRICS_FILE
        self.tensorboard = tensorboard
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        rows = [row for row in read_metrics(self.file) if row["step"] <= state.global_step]
        kept = rows if state.global_step else []
        write_text_atomic(self.file, "".join(json.dumps(row) + "\n" for row in kept))
        self.writer = None
        if self.tensorboard is not None:
            self.writer = _open_writer(self.tensorboard, state.global_step)
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.label, unit="step"
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" in logs:  # the Trainer's closing summary: times, not metrics
            return
        self.write(state.global_step, {k: v for k, v in logs.items() if k != "epoch"})
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row {"step": step, **values}."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items() if self.writer else ():
            group = name.replace("eval_", "eval/") if "eval_" in name else name
            self.writer.add_scalar(group if "/" in group else f"train/{name}", value, step)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)
        if control.should_evaluate:
            control.should_save = True  # so that the best step is always one that was saved

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        if self.writer:
            self.writer.close()


def _open_writer(folder: Path, step: int):  # noqa: ANN202 - SummaryWriter, slow to import
    from torch.utils.tensorboard import SummaryWriter

    if step == 0:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; a torn last line is left out, no file is no rows."""
    path = Path(path)
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


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
    if checkpoint:
        print(f"resuming from {display_path(checkpoint)}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if any(not p.isfinite().all() for p in trainer.model.parameters() if p.requires_grad):
        raise GateFailed(
            "Training ended in weights that are not numbers.", "Lower the learning rate."
        )
