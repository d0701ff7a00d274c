"""What goes wrong hours into training, said early: memory, a loss that is no number, lost time."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hallulib.errors import GateFailed, ModelError

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


@contextmanager
def explain_out_of_memory(section: str) -> Iterator[None]:
    """Turn running out of memory (CUDA, MPS or CPU) into a ModelError that says what to lower.

    `section` is the part of the recipe that sets the batch: "sft" or "dpo".
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and MPS and CPU raise it plainly
        if not _NO_MEMORY.search(str(error)):
            raise
        raise ModelError(
            f"The longest batch of {section} does not fit: {str(error).splitlines()[0]}",
            f"Lower {section}.batch_size and raise {section}.gradient_accumulation by as much, set "
            "model.gradient_checkpointing=true, or lower model.max_length.",
        ) from error


def check_loss_is_a_number(loss: torch.Tensor, step: int) -> None:
    """Raise GateFailed at the first loss that is not finite; what was saved before stays good."""
    if not loss.isfinite():
        raise GateFailed(
            f"The loss of step {step + 1} is {loss.item()}.",
            "Lower the learning rate or raise the warm-up; with float16 try bfloat16 or float32.",
        )


class SlowStepWatch(TrainerCallback):
    """Says so when a step took many times the usual: a computer that slept, memory that swaps."""

    def __init__(self, factor: float = 5.0, least_seconds: float = 5.0) -> None:
        self.factor, self.least_seconds = factor, least_seconds
        self.seconds: list[float] = []
        self.outliers: list[tuple[int, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.time()  # not monotonic: that clock may stand still while asleep

    def on_step_end(self, args, state, control, **kwargs):
        took = time.time() - self.began
        usual = statistics.median(self.seconds) if len(self.seconds) >= 3 else float("inf")
        if took > max(self.factor * usual, self.least_seconds):
            self.outliers.append((state.global_step, took))
            tqdm.write(
                f"step {state.global_step} took {took:.0f} s, the usual is {usual:.1f} s: did the "
                "computer sleep, or is memory short?"
            )
        else:
            self.seconds.append(took)
