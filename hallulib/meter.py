"""Measured time and peak memory of a block of code, beside what was predicted; every stage runs
inside one."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil


@dataclass
class Measurement:
    """What `measure` found, in seconds and bytes; complete when the block has ended.

    `peak_rss_bytes` is the largest resident memory of this process seen while the block ran (a
    sample every 10 ms), everything loaded before included: subtract `rss_before_bytes` for the
    block's own share. `peak_cuda_bytes` is what torch allocated at most on the current GPU,
    `peak_cuda_reserved_bytes` what its allocator held; `peak_mps_bytes` what the driver of an Apple
    GPU had handed out at a sample. `peak_tensor_bytes` is what :func:`note_tensor_peak` was told.
    """

    label: str
    device: str = "cpu"
    wall_seconds: float = 0.0
    rss_before_bytes: int = 0
    peak_rss_bytes: int = 0
    peak_cuda_bytes: int = 0
    peak_cuda_reserved_bytes: int = 0
    peak_mps_bytes: int = 0
    peak_tensor_bytes: int = 0

    @property
    def peak_memory_bytes(self) -> int:
        """Peak on the device that does the work: GPU memory if it was used, else resident."""
        return self.peak_cuda_bytes or self.peak_mps_bytes or self.peak_rss_bytes


@dataclass(frozen=True)
class Expectation:
    """What was predicted for a stage before it started: bytes that it needs, of them in tensors
    (`allocated`) and in the allocator's hands (`reserved`), and what would help."""

    needed: int
    advice: str
    allocated: int = 0
    reserved: int = 0


# By stage; the memory budget, which stands above the stages, writes down here what it predicts.
EXPECTED: dict[str, Expectation] = {}
_RUNNING: list[Measurement] = []


def note_tensor_peak(size: int) -> None:
    """Tell the innermost `measure` how many bytes of tensors somebody saw alive on the CPU."""
    if _RUNNING:
        _RUNNING[-1].peak_tensor_bytes = max(size, _RUNNING[-1].peak_tensor_bytes)


class PeakSampler:
    """A thread that samples the resident memory of a process and keeps the largest value.

    By default that is this process; with `children=True` it is the sum of all processes below it
    instead, as for the kernels that the course starts, with their data workers.
    """

    def __init__(self, children: bool = False, interval: float = 0.01) -> None:
        self._process = psutil.Process()
        self._children = children
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_bytes = 0
        self.peak_mps_bytes = 0

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
        mps = None if self._children else _mps()
        if mps:
            self.peak_mps_bytes = max(self.peak_mps_bytes, mps.driver_allocated_memory())


def take_comparison(stage: str, meter: Measurement) -> dict[str, Any]:
    """Return predicted beside measured bytes of a stage; empty where either is missing.

    Predicted is what was asked for before the stage started (`memory.check_fits`). On a GPU both
    are what the allocator gave out, and what it held ("reserved"); on an Apple GPU measured is what
    the driver handed out; on a CPU both are tensors. A prediction counts once: another run of the
    stage, with other settings, must ask anew.
    """
    expected = EXPECTED.pop(stage, None)
    measured = meter.peak_cuda_bytes or meter.peak_mps_bytes or meter.peak_tensor_bytes
    if expected is None or not expected.allocated or not measured:
        return {}
    found = {
        "predicted_bytes": expected.allocated,
        "measured_bytes": measured,
        "error": expected.allocated / measured - 1,
    }
    if meter.peak_cuda_reserved_bytes:
        found["predicted_reserved_bytes"] = expected.reserved
        found["measured_reserved_bytes"] = meter.peak_cuda_reserved_bytes
    return found


@contextmanager
def measure(label: str, snapshot: str | Path | None = None) -> Iterator[Measurement]:
    """Measure a block: `with measure("sft") as m: ...`, then `m.wall_seconds`, `m.peak_rss_bytes`.

    The figures are filled in also when the block raises. `snapshot`: where to write the history of
    CUDA's allocator, for the viewer at https://docs.pytorch.org/memory_viz (nothing without CUDA).
    """
    result = Measurement(label, rss_before_bytes=psutil.Process().memory_info().rss)
    cuda = _cuda()
    if cuda:
        cuda.reset_peak_memory_stats()
        if snapshot:
            cuda.memory._record_memory_history()
    sampler = PeakSampler().start()
    start = time.perf_counter()
    _RUNNING.append(result)
    try:
        yield result
    finally:
        _RUNNING.remove(result)
        cuda = _cuda()
        if cuda:
            _read_cuda(cuda, result, snapshot)
        result.wall_seconds = time.perf_counter() - start
        result.peak_rss_bytes = sampler.stop()
        result.peak_mps_bytes = sampler.peak_mps_bytes
        if result.peak_cuda_bytes:
            result.device = f"cuda ({cuda.get_device_name()})"
        elif result.peak_mps_bytes:
            result.device = "mps"


def _read_cuda(cuda: ModuleType, result: Measurement, snapshot: str | Path | None) -> None:
    cuda.synchronize()
    result.peak_cuda_bytes = cuda.max_memory_allocated()
    result.peak_cuda_reserved_bytes = cuda.max_memory_reserved()
    if snapshot:
        cuda.memory._dump_snapshot(str(snapshot))
        cuda.memory._record_memory_history(enabled=None)


def _cuda() -> ModuleType | None:
    """torch.cuda if a stage has loaded torch and a GPU is there; never the reason to load torch."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _mps() -> ModuleType | None:
    """torch.mps if a stage has loaded torch on an Apple GPU."""
    torch = sys.modules.get("torch")
    has_mps = torch is not None and torch.backends.mps.is_available()
    return torch.mps if has_mps else None
