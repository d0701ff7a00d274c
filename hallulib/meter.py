"""Measured time and peak memory of a block of code, and what to lower when memory runs out."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from hallulib.errors import HallulibError


@contextmanager
def measure() -> Iterator[dict[str, Any]]:
    """Measure a block: the dict is filled when the block has ended, also when it raises.

    `device`, `wall_seconds`, `peak_memory_bytes` (what torch allocated on the GPU if one was used,
    else what was resident in this process) and `reserved_bytes` (by the GPU's allocator, or 0).
    """
    found: dict[str, Any] = {"device": "cpu"}
    start, cuda = time.perf_counter(), _loaded("cuda")
    if cuda:
        cuda.reset_peak_memory_stats()
    try:
        with sample_peak() as peak:
            yield found
    finally:
        allocated, reserved, cuda = 0, 0, _loaded("cuda")
        if cuda:
            cuda.synchronize()
            allocated, reserved = cuda.max_memory_allocated(), cuda.max_memory_reserved()
        elif mps := _loaded("mps"):  # its driver keeps what it hands out: the end is the peak
            allocated = mps.driver_allocated_memory()
        if allocated:
            found["device"] = f"cuda ({cuda.get_device_name()})" if cuda else "mps"
        found["wall_seconds"] = round(time.perf_counter() - start, 3)
        found["peak_memory_bytes"] = allocated or peak["bytes"]
        found["reserved_bytes"] = reserved


@contextmanager
def sample_peak(
    children: bool = False, on_sample: Callable[[], object] = lambda: None
) -> Iterator[dict[str, int]]:
    """The largest resident memory of this process while the block runs, as `peak["bytes"]`; with
    `children` the sum of all processes below it instead, as for the kernels of the course."""
    me, ended, peak = psutil.Process(), threading.Event(), {"bytes": 0}

    def sample() -> None:
        total = 0
        for process in me.children(recursive=True) if children else [me]:
            with suppress(psutil.Error):  # a process that has just ended uses nothing
                total += process.memory_info().rss
        peak["bytes"] = max(peak["bytes"], total)

    def go_on() -> None:
        while not ended.wait(0.2 if children else 0.01):
            sample()
            on_sample()

    sample()
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
        sample()


def _loaded(kind: str) -> ModuleType | None:
    """torch.cuda or torch.mps if such a GPU is there; never the reason to load torch."""
    gpu = getattr(sys.modules.get("torch"), kind, None)
    return gpu if gpu and gpu.is_available() else None


@contextmanager
def explain_out_of_memory(stage: str, longest: int, budget: Path) -> Iterator[None]:
    """Turn running out of memory (CUDA, MPS or CPU) into a HallulibError that says what to lower,
    and what `memory.check_fits` has predicted in `budget`; `longest` is a row in tokens."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and MPS and CPU raise it plainly
        if not re.search(r"out of memory|(can't allocate|not enough) memory", str(error), re.I):
            raise
        what = f"The longest batch of {stage} (rows of up to {longest} tokens) does not fit: "
        what += str(error).splitlines()[0]
        accumulate = f" and raise {stage}.gradient_accumulation by as much"
        advice = (
            f"Lower {stage}.batch_size{'' if stage == 'reference' else accumulate}, set "
            "model.gradient_checkpointing=true, or lower model.max_length."
        )
        if budget.exists():
            predicted = json.loads(budget.read_text("utf-8"))
            what += f" ({predicted['needed'] / 2**30:.2f} GiB were predicted)"
            advice = f"{predicted['advice']} Or: {advice}"
        raise HallulibError(what, advice) from error
