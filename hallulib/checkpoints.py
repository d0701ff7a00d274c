"""What a training leaves on the disk: its log, its checkpoints, and in the end the adapter."""

import json
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hallulib.errors import GateFailed
from hallulib.files import append_lines, display_path, recover_lines, write_json_atomic, write_jsonl
from hallulib.models import save_adapter
from hallulib.processes import is_main_process, process_rank, wait_for_all
from hallulib.run import Result

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "state.json"  # written last: a checkpoint without it does not count


class Log:
    """Every logged value, in `folder`/metrics.jsonl and, where `board` is a folder, TensorBoard.

    Under several processes each keeps the rows, and the main one writes them.
    """

    def __init__(self, folder: Path, board: Path | None = None) -> None:
        self.folder, self.board, self.writer = folder, board, None
        self.rows: list[dict[str, Any]] = []

    def start(self, step: int) -> None:
        """Take up the record at a checkpoint: what was logged later will be done again."""
        rows = recover_lines(self.folder / METRICS_FILE)
        self.rows = [row for row in rows if row["step"] <= step] if step else []
        wait_for_all()  # everybody has read it before it is written
        if not is_main_process():
            return
        write_jsonl(self.folder / METRICS_FILE, self.rows)
        if self.board:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            if not step:
                shutil.rmtree(self.board, ignore_errors=True)
            self.writer = SummaryWriter(str(self.board), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one row {"step": step, **values}."""
        self.rows.append({"step": step, **values})
        if is_main_process():
            with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                append_lines(file, self.rows[-1:])
        for name, value in values.items() if self.writer else ():
            group = name.replace("eval_", "eval/")
            self.writer.add_scalar(group if "/" in group else f"train/{name}", value, step)

    def find_best_step(self) -> int:
        """Return the step with the lowest validation loss; the start does not count."""
        measured = [row for row in self.rows if "eval_loss" in row and row["step"]]
        return min(measured, key=lambda row: row["eval_loss"])["step"] if measured else 0

    def name_checkpoint(self, step: int) -> Path:
        """Return where the checkpoint of a step lies."""
        return self.folder / f"checkpoint-{step}"

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.writer:
            self.writer.close()


def save_checkpoint(
    policy: PeftModel, optimizer: Optimizer, scheduler: LRScheduler, log: Log, state: dict[str, Any]
) -> None:
    """Save adapter, optimiser, schedule, random states and `state`, which has the `step`.

    This checkpoint and the best are kept. The base model is in no checkpoint. Raises GateFailed
    when a weight is no number any more.
    """
    if any(not p.isfinite().all() for p in policy.parameters() if p.requires_grad):
        raise GateFailed("Training led to weights that are no numbers.", "Lower the learning rate.")
    path = log.name_checkpoint(state["step"])
    if is_main_process():
        save_adapter(policy, path)
    wait_for_all()
    save_accelerator_state(path, [], [optimizer], [scheduler], [], process_rank(), state["step"])
    wait_for_all()
    if is_main_process():
        write_json_atomic(path / STATE_FILE, state)
        kept = {path, log.name_checkpoint(log.find_best_step())}
        for old in set(log.folder.glob("checkpoint-*")) - kept:
            shutil.rmtree(old)


def load_checkpoint(
    policy: PeftModel, optimizer: Optimizer, scheduler: LRScheduler, log: Log, reference: str
) -> dict[str, Any]:
    """Put everything back as it was at the newest whole checkpoint; returns its state, {"step": 0}
    without one. Raises GateFailed where it was trained against another reference."""
    states = [json.loads(file.read_text("utf-8")) for file in log.folder.glob(f"*/{STATE_FILE}")]
    state = max(states, key=lambda state: state["step"], default={"step": 0})
    wait_for_all()  # everybody has seen the same one
    if not state["step"]:
        return state
    path, began_with = log.name_checkpoint(state["step"]), state["reference"]
    if began_with != reference:
        raise GateFailed(
            f"{display_path(path)} was trained against reference {began_with[:12] or 'none'}, and "
            f"the run now has {reference[:12]}.",
            "Start DPO anew (`--force`), or restore the SFT adapter and the cache it began with.",
        )
    print(f"resuming from {display_path(path)}")
    policy.load_adapter(str(path), "default", is_trainable=True)
    load_accelerator_state(path, [], [optimizer], [scheduler], [], process_rank())
    return state


def write_trained(
    policy: PeftModel, log: Log, folder: Path, kept: int, notes: dict[str, Any]
) -> Result:
    """Write `folder`/adapter, which is that of step `kept`, and `folder`/metrics.jsonl.

    To the notes come steps, best_step (by validation loss), kept_step, and metrics: those of the
    kept step, eval_* and guardrail/*.
    """
    if is_main_process():
        save_adapter(policy, folder / "adapter")
        write_jsonl(folder / METRICS_FILE, log.rows)
    logged = {k: v for row in log.rows if row["step"] == kept for k, v in row.items()}
    metrics = {k: v for k, v in logged.items() if k.startswith(("eval_", "guardrail/"))}
    steps = {"steps": log.rows[-1]["step"], "best_step": log.find_best_step(), "kept_step": kept}
    return Result(folder / "adapter", notes | steps | {"metrics": metrics})


@contextmanager
def note_signals() -> Iterator[list[int]]:
    """Within the block Ctrl-C and SIGTERM are only noted, so that a step can end before they do."""
    noted: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
