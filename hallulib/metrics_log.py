"""The record of a training: every logged value in metrics.jsonl and TensorBoard, and a bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from hallulib.files import write_text_atomic
from hallulib.processes import is_main_process, wait_for_all

METRICS_FILE = "metrics.jsonl"


class MetricsLog(TrainerCallback):
    """Writes every logged value to metrics.jsonl and TensorBoard, and shows a progress bar.

    On resume, rows past the checkpoint are dropped, so that the file reads as if there had been
    no interruption. Under several processes each keeps the rows, and the main one writes them.
    """

    def __init__(self, folder: Path, tensorboard: Path | None, label: str) -> None:
        self.file = folder / METRICS_FILE
        self.tensorboard = tensorboard
        self.label = label
        self.rows: list[dict[str, Any]] = []
        self.writer = None

    def on_train_begin(self, args, state, control, **kwargs):
        rows = [row for row in read_metrics(self.file) if row["step"] <= state.global_step]
        self.rows = rows if state.global_step else []
        wait_for_all()  # everybody has read it before it is written
        self.writer = None
        if is_main_process():
            write_text_atomic(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))
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
        self.rows.append({"step": step, **values})
        if is_main_process():
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        for name, value in values.items() if self.writer else ():
            group = name.replace("eval_", "eval/") if "eval_" in name else name
            self.writer.add_scalar(group if "/" in group else f"train/{name}", value, step)

    def values_at(self, step: int, *prefixes: str) -> dict[str, float]:
        """Return the values that were logged at a step and whose names begin so."""
        at_step = [row for row in self.rows if row["step"] == step]
        return {k: v for row in at_step for k, v in row.items() if k.startswith(prefixes)}

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


class ValidationPatience(TrainerCallback):
    """Stops when so many evaluations in a row brought no lower validation loss."""

    def __init__(self, log: MetricsLog, patience: int) -> None:
        self.log, self.patience = log, patience

    def on_evaluate(self, args, state, control, **kwargs):
        losses = [row["eval_loss"] for row in self.log.rows if "eval_loss" in row]
        waited = len(losses) - 1 - losses.index(min(losses))
        if waited >= self.patience:
            tqdm.write(f"step {state.global_step}: {waited} evaluations without a lower loss")
            control.should_training_stop = True
