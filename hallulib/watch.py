"""What goes wrong hours into training, said early: memory, a loss that is no number, lost time."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hallulib.errors import GateFailed, HallulibError
from hallulib.meter import EXPECTED, note_tensor_peak
from hallulib.tracker import StorageTracker, follow_model

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


@contextmanager
def explain_out_of_memory(stage: str, longest: int) -> Iterator[None]:
    """Turn running out of memory (CUDA, MPS or CPU) into a HallulibError that says what to lower.

    `stage` is "sft", "reference" or "dpo", `longest` the tokens of the longest row. Beside it
    stand the memory in use and, where the stage's budget was asked before, the prediction.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and MPS and CPU raise it plainly
        if not _NO_MEMORY.search(str(error)):
            raise
        found = [f"at most {_read_peak_bytes() / 2**30:.2f} GiB were in use"]
        as_much = f" and raise {stage}.gradient_accumulation by as much"
        advice = (
            f"Lower {stage}.batch_size{'' if stage == 'reference' else as_much}, set "
            "model.gradient_checkpointing=true, or lower model.max_length."
        )
        if stage in EXPECTED:
            found.append(f"{EXPECTED[stage].needed / 2**30:.2f} GiB were predicted")
            advice = f"{EXPECTED[stage].advice} Or: {advice}"
        raise HallulibError(
            f"The longest batch of {stage} (rows of up to {longest} tokens) does not fit: "
            f"{str(error).splitlines()[0]} ({', '.join(found)})",
            advice,
        ) from error


class TensorPeak:
    """Follows the tensors of a pass on the CPU whenever a batch is larger than all before, and for
    two more of that size (gradients are there then), anew once there are optimiser states: where
    the peak lies, at no cost for the rest. A GPU's allocator counts for itself."""

    def __init__(self) -> None:
        self.tokens, self.turns, self.has_states = 0, 0, False

    @contextmanager
    def watch(
        self,
        batch: Mapping[str, torch.Tensor],
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Iterator[None]:
        """Within the block the peak is seen, and told to the stage's meter."""
        if optimizer and optimizer.state and not self.has_states:
            self.tokens, self.has_states = 0, True
        if not self._is_worth(batch["input_ids"].numel(), model):
            yield
            return
        with StorageTracker() as tracker:
            follow_model(tracker, model)
            states = optimizer.state.values() if optimizer else ()
            held = [p.grad for p in model.parameters()] + [v for s in states for v in s.values()]
            for tensor in [*held, *batch.values()]:
                if isinstance(tensor, torch.Tensor):
                    tracker.follow(tensor)
            yield
        note_tensor_peak(tracker.trace.find_peak()[0])

    def _is_worth(self, tokens: int, model: torch.nn.Module) -> bool:
        if tokens > self.tokens:
            self.tokens, self.turns = tokens, 3
        if tokens < self.tokens or not self.turns or next(model.parameters()).device.type != "cpu":
            return False
        self.turns -= 1
        return True


def _read_peak_bytes() -> int:
    """Most that was allocated on the GPU, or else what this process holds."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss


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
