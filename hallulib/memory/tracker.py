"""Follows every tensor storage that lives while real code runs, on real or on fake tensors.

A fake tensor has a shape, a type and a storage of so many bytes, and no numbers. PyTorch's own code
runs on it as on a real one, so what is alive when is known without the memory being there.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Trace:
    """What was allocated and freed, in order.

    `sizes` and `labels` describe storage i: bytes, and what it holds ("" = not said). `events` are
    i + 1 for an allocation, -(i + 1) for a release. `marks` are (first event, name) of each phase.
    """

    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def list_live(self) -> list[int]:
        """Return the bytes alive after each event."""
        sizes = (self.sizes[abs(e) - 1] * (1 if e > 0 else -1) for e in self.events)
        return list(accumulate(sizes))

    def find_peak(self) -> int:
        """Return the largest sum of bytes alive."""
        return max(self.list_live())

    def list_alive(self, at: int) -> set[int]:
        """Return the storages alive after the first `at` events."""
        return self.list_born(0, at) - {-event - 1 for event in self.events[:at] if event < 0}

    def list_phases(self) -> dict[str, tuple[int, int]]:
        """Return the first event and the end of every phase, by name; the last of a name counts."""
        starts = [start for start, _ in self.marks] + [len(self.events)]
        return {name: (starts[i], starts[i + 1]) for i, (_, name) in enumerate(self.marks)}

    def list_born(self, start: int, end: int | None = None) -> set[int]:
        """Return the storages that were allocated from event `start` on."""
        return {event - 1 for event in self.events[start:end] if event > 0}


class StorageTracker(TorchDispatchMode):
    """Within the block every storage that an operator makes is followed until it is gone.

    `vocabulary` is the last dimension by which logits are known, `on_cuda` counts what a GPU's
    kernels take inside. Python's collector of cycles stands still, so that traces are alike.
    """

    def __init__(self, vocabulary: int = 0, on_cuda: bool = False) -> None:
        super().__init__()
        self.trace = Trace()
        self.vocabulary = vocabulary
        self._scratch = SCRATCH | (CUDA_SCRATCH if on_cuda else {})
        self._live: dict[int, tuple[int, weakref.ref]] = {}
        self.start_phase("load")

    def __enter__(self) -> StorageTracker:
        gc.disable()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        gc.enable()
        super().__exit__(*raised)
        self._live.clear()  # what is freed from here on is the end of the program

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs a tenth of the time

    def start_phase(self, name: str) -> None:
        """What is allocated from here on belongs to phase `name`."""
        self.trace.marks.append((len(self.trace.events), name))

    def follow(self, tensor: torch.Tensor, label: str = "") -> None:
        """Follow a tensor's storage from here on, or give one that is followed a label."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            if label:
                self.trace.labels[self._live[key][0]] = label
            return
        if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
            label = label or "logits"
        number = self._allocate(storage.nbytes(), label)
        self._live[key] = (number, weakref.ref(storage, lambda _: self._release(key, number)))

    def _allocate(self, size: int, label: str = "") -> int:
        trace, number = self.trace, len(self.trace.sizes)
        trace.sizes.append(size)
        trace.labels.append(label)
        trace.events.append(number + 1)
        return number

    def _release(self, key: int, number: int) -> None:
        if self._live.pop(key, None):
            self.trace.events.append(-number - 1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_fake = args and isinstance(args[0], FakeTensor)
        if is_fake and func is torch.ops.prim.device.default:
            return args[0].fake_device  # most calls are this question
        name = func._schema.name
        if is_fake:  # what depends on values gets one here
            if name == "aten::_local_scalar_dense":  # no sample has ended, no norm is infinite
                return torch.zeros((), dtype=args[0].dtype).item()
            if name == "aten::index":
                args = (args[0], _count_masks(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor)
        if name in self._scratch:  # allocated within the operator, given back before it returns
            number = self._allocate(self._scratch[name](*args))
            self.trace.events.append(-number - 1)
        return out


def _count_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Turn real masks into the positions where they are true, whose number is known."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        real = index is not None and not isinstance(index, FakeTensor)
        found += index.nonzero().unbind(1) if real and index.dtype == torch.bool else [index]
    return found


# Bytes that operators take and give back inside, where neither fake nor real tracing looks.


def _gemm_4bit(a, b, shape, absmax, blocksize, *others) -> int:
    """bitsandbytes' default kernel unpacks the whole weight (and first its scales)."""
    return shape[0] * shape[1] * a.element_size() + 8 * -(-shape[0] * shape[1] // blocksize)


def _int8_scaled_mm(a, b, *others) -> int:
    """The product in int32, and in float16 before it gets its type."""
    return 6 * (a.numel() // a.shape[-1]) * b.shape[0]


def _softmax_backward(grad, *others) -> int:
    """CUDA computes grad * output first."""
    return grad.numel() * grad.element_size()


SCRATCH = {"bitsandbytes::gemm_4bit": _gemm_4bit}
CUDA_SCRATCH = {
    "aten::_softmax_backward_data": _softmax_backward,
    "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
}


def follow_model(tracker: StorageTracker, model: torch.nn.Module) -> None:
    """Follow the weights, with the constants that bitsandbytes keeps beside quantised ones."""
    constants: list[torch.Tensor | None] = []
    for name, parameter in model.named_parameters():
        tracker.follow(parameter, "lora_weights" if "lora_" in name else "base_weights")
        packing = getattr(parameter, "quant_state", None)  # NF4: scales, and scales of these
        for state in (packing, getattr(packing, "state2", None)):
            constants += [getattr(state, part, None) for part in ("absmax", "code", "offset")]
        constants.append(getattr(parameter, "SCB", None))  # int8
    for module in model.modules():
        state = getattr(module, "state", None)  # int8, after its first use
        constants.append(getattr(state, "SCB", None))
    for buffer in model.buffers():
        tracker.follow(buffer, "base_weights")
    for constant in constants:
        if constant is not None:
            tracker.follow(constant, "quantisation_constants")
