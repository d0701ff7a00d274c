"""Measured time and peak memory of a block of code, and what to lower when memory runs out."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import psutil

from hallulib.errors import HallulibError

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


@dataclass
class Measurement:
    """What `measure` found, in seconds and bytes; complete when the block has ended.

    `peak_rss_bytes` is the largest resident memory of this process seen while the block ran (a
    sample every 10 ms), everything loaded before included: subtract `rss_before_bytes` for the
    block's own share. `peak_cuda_bytes` is what torch allocated at most on the current GPU,
    `peak_cuda_reserved_bytes` what its allocator held; `peak_mps_bytes` what the driver of an Apple
    GPU had handed out at a sample.
    """

    label: str
    device: str = "cpu"
    wall_seconds: float = 0.0
    rss_before_bytes: int = 0
    peak_rss_bytes: int = 0
    peak_cuda_bytes: int = 0
    peak_cuda_reserved_bytes: int = 0
    peak_mps_bytes: int = 0

    @property
    def peak_memory_bytes(self) -> int:
        """Peak on the device that does the work: GPU memory if it was used, else resident."""
        return self.peak_cuda_bytes or self.peak_mps_bytes or self.peak_rss_bytes


class PeakSampler:
    """A thread that samples the resident memory of a process and keeps the largest value.

    By default that is this process; with `children=True` it is the sum of all processes below it
    instead, as for the kernels that the course starts, with their data workers.
    """

    def __init__(self, children: bool = False, interval: float = 0.01) -> None:
        self._process, self._children, self._interval = psutil.Process(), children, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_bytes = self.peak_mps_bytes = 0

    def start(self) -> PeakSampler:
        """Take the first sample and go on sampling until `stop`."""
        self._sample()
        self._thread.start()
        return self

    def stop(self) -> int:
        """Take a last sample; returns the peak in bytes."""
        self._stop.set()
        self._thread.join()
        self._sample()
        return self.peak_bytes

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        below = self._process.children(recursive=True) if self._children else [self._process]
        total = 0
        for process in below:
            with suppress(psutil.Error):  # a process that has just ended uses nothing
                total += process.memory_info().rss
        self.peak_bytes = max(self.peak_bytes, total)
        mps = _loaded("mps")
        if mps and not self._children:
            self.peak_mps_bytes = max(self.peak_mps_bytes, mps.driver_allocated_memory())


@contextmanager
def measure(label: str) -> Iterator[Measurement]:
    """Measure a block: `with measure("sft") as m: ...`, then `m.wall_seconds`, `m.peak_rss_bytes`.

    The figures are filled in also when the block raises.
    """
    result = Measurement(label, rss_before_bytes=psutil.Process().memory_info().rss)
    cuda = _loaded("cuda")
    if cuda:
        cuda.reset_peak_memory_stats()
    sampler = PeakSampler().start()
    start = time.perf_counter()
    try:
        yield result
    finally:
        cuda = _loaded("cuda")
        if cuda:
            cuda.synchronize()
            result.peak_cuda_bytes = cuda.max_memory_allocated()
            result.peak_cuda_reserved_bytes = cuda.max_memory_reserved()
        result.wall_seconds = time.perf_counter() - start
        result.peak_rss_bytes = sampler.stop()
        result.peak_mps_bytes = sampler.peak_mps_bytes
        if result.peak_cuda_bytes:
            result.device = f"cuda ({cuda.get_device_name()})"
        elif result.peak_mps_bytes:
            result.device = "mps"


def _loaded(kind: str) -> ModuleType | None:
    """torch.cuda or torch.mps if such a GPU is there; never the reason to load torch."""
    torch = sys.modules.get("torch")
    gpu = getattr(torch, kind, None)
    return gpu if gpu is not None and gpu.is_available() else None


@contextmanager
def explain_out_of_memory(stage: str, longest: int, budget: Path) -> Iterator[None]:
    """Turn running out of memory (CUDA, MPS or CPU) into a HallulibError that says what to lower.

    `stage` is "sft", "reference" or "dpo", `longest` the tokens of the longest row. Beside it stand
    the memory in use and, where `memory.check_fits` has written `budget`, its prediction.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, and MPS and CPU raise it plainly
        if not _NO_MEMORY.search(str(error)):
            raise
        cuda = _loaded("cuda")
        used = cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        found = [f"at most {used / 2**30:.2f} GiB were in use"]
        as_much = f" and raise {stage}.gradient_accumulation by as much"
        advice = (
            f"Lower {stage}.batch_size{'' if stage == 'reference' else as_much}, set "
            "model.gradient_checkpointing=true, or lower model.max_length."
        )
        if budget.exists():
            predicted = json.loads(budget.read_text("utf-8"))
            found.append(f"{predicted['needed'] / 2**30:.2f} GiB were predicted")
            advice = f"{predicted['advice']} Or: {advice}"
        raise HallulibError(
            f"The longest batch of {stage} (rows of up to {longest} tokens) does not fit: "
            f"{str(error).splitlines()[0]} ({', '.join(found)})",
            advice,
        ) from error
