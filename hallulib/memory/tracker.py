"""Follows every tensor storage that lives while real code runs, on real or on fake tensors.

A fake tensor has a shape, a type and a storage of so many bytes, and no numbers. PyTorch's own code
(autograd, checkpointing, optimisers) runs on it as on a real one, only faster, so what is alive
when is known without the memory being there.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass
class Trace:
    """What was allocated and freed, in order.

    `sizes` and `labels` describe storage i: bytes, and what it holds ("" = not said). `events` are
    i + 1 for an allocation, -(i + 1) for a release. `marks` are (number of events before it, name)
    of every phase.
    """

    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def list_live(self) -> list[int]:
        """Return the bytes alive after each event."""
        sizes = (self.sizes[abs(e) - 1] * (1 if e > 0 else -1) for e in self.events)
        return list(accumulate(sizes))

    def find_peak(self) -> tuple[int, int]:
        """Return (bytes, number of events up to it) of the largest sum alive."""
        live = self.list_live()
        at = max(range(len(live)), key=live.__getitem__)
        return live[at], at + 1

    def list_alive(self, at: int) -> list[int]:
        """Return the storages alive after the first `at` events."""
        alive = {}
        for event in self.events[:at]:
            if event > 0:
                alive[event - 1] = True
            else:
                del alive[-event - 1]
        return list(alive)

    def list_phases(self) -> list[tuple[str, int, int]]:
        """Return (name, first event, end) of every phase."""
        starts = [start for start, _ in self.marks] + [len(self.events)]
        return [(name, starts[i], starts[i + 1]) for i, (_, name) in enumerate(self.marks)]

    def list_born(self, start: int, end: int | None = None) -> set[int]:
        """Return the storages that were allocated from event `start` on."""
        return {event - 1 for event in self.events[start:end] if event > 0}


class StorageTracker(TorchDispatchMode):
    """Within the block every storage that an operator makes is followed until it is gone.

    `vocabulary` names the last dimension by which logits are known. `on_cuda` adds what kernels of
    CUDA do differently from the CPU's whose operators are traced (:data:`CUDA_SCRATCH`). Python's
    collector of cycles stands still meanwhile, so that a trace is the same each time.
    """

    def __init__(self, vocabulary: int = 0, on_cuda: bool = False) -> None:
        super().__init__()
        self.trace = Trace()
        self.vocabulary, self.on_cuda = vocabulary, on_cuda
        self._live: dict[int, tuple[int, weakref.ref]] = {}
        self.start_phase("load")

    def __enter__(self) -> StorageTracker:
        self._collects = gc.isenabled()
        gc.disable()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self._collects:
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
        number = self._allocate(storage.nbytes(), label or self._guess_label(tensor))
        self._live[key] = (number, weakref.ref(storage, lambda _: self._release(key, number)))

    def _allocate(self, size: int, label: str) -> int:
        trace, number = self.trace, len(self.trace.sizes)
        trace.sizes.append(size)
        trace.labels.append(label)
        trace.events.append(number + 1)
        return number

    def _release(self, key: int, number: int) -> None:
        if self._live.pop(key, None):
            self.trace.events.append(-number - 1)

    def _guess_label(self, tensor: torch.Tensor) -> str:
        wide = tensor.dim() > 1 and self.vocabulary and tensor.shape[-1] == self.vocabulary
        return "logits" if wide else ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # most calls are this question
        name = func._schema.name
        stand_in = STAND_INS.get(name)
        if stand_in is not None:
            args = stand_in(args)
            if not isinstance(args, tuple):
                return args  # a number: the answer itself
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor)
        scratch = SCRATCH.get(name) or (CUDA_SCRATCH.get(name) if self.on_cuda else None)
        size = scratch(*args) if scratch is not None else 0
        if size:  # allocated within the operator, and given back before it returns
            self.trace.events.append(-self._allocate(size, "") - 1)
        return out


# Fake tensors have no values, so what depends on a value gets one here. -----------------------


def _select_by_mask(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """x[mask]: the mask is real, x may be fake; give it the positions, whose number is known."""
    if not isinstance(args[0], FakeTensor):
        return args
    indices: list[torch.Tensor | None] = []
    for index in args[1]:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            indices += index.nonzero().unbind(1)
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


def _read_value(args: tuple[Any, ...]) -> Any:
    """tensor.item(): of a fake one, nothing: no sample has ended yet, no norm is infinite."""
    if not isinstance(args[0], FakeTensor):
        return args
    return torch.zeros((), dtype=args[0].dtype).item()


STAND_INS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "aten::index": _select_by_mask,
    "aten::_local_scalar_dense": _read_value,
}


# Bytes that operators take and give back inside, where neither fake nor real tracing looks. ----


def _gemm_4bit(a, b, shape, absmax, blocksize, quant_type, bias=None, *constants) -> int:
    """bitsandbytes' default kernel unpacks the whole weight (and first its scales)."""
    scales = 8 * -(-shape[0] * shape[1] // blocksize)
    return shape[0] * shape[1] * a.element_size() + scales


def _int8_scaled_mm(a, b, *others) -> int:
    """The product in int32, and in float16 before it gets its type."""
    return 6 * (a.numel() // a.shape[-1]) * b.shape[0]


def _softmax_backward(grad, output, dim, input_dtype) -> int:
    """CUDA computes grad * output first."""
    return grad.numel() * grad.element_size()


SCRATCH: dict[str, Callable[..., int]] = {"bitsandbytes::gemm_4bit": _gemm_4bit}
CUDA_SCRATCH: dict[str, Callable[..., int]] = {
    "aten::_softmax_backward_data": _softmax_backward,
    "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
}


def follow_model(tracker: StorageTracker, model: torch.nn.Module, label: str = "") -> None:
    """Follow the weights, with the constants of quantised ones."""
    for name, parameter in model.named_parameters():
        tracker.follow(parameter, label or ("lora_weights" if "lora_" in name else "base_weights"))
        for constant in list_quantisation_constants(parameter):
            tracker.follow(constant, "quantisation_constants")
    for module in model.modules():
        scales = getattr(getattr(module, "state", None), "SCB", None)  # int8, after its first use
        if scales is not None:
            tracker.follow(scales, "quantisation_constants")
    for buffer in model.buffers():
        tracker.follow(buffer, label or "base_weights")


def list_quantisation_constants(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """Return the tensors that bitsandbytes keeps beside a packed weight."""
    state = getattr(parameter, "quant_state", None)
    found = [getattr(parameter, "SCB", None)]
    if state is not None:
        found += [state.absmax, state.code, state.offset]
        found += [state.state2.absmax, state.state2.code] if state.nested else []
    return [tensor for tensor in found if tensor is not None]
