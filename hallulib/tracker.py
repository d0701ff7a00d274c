"""Follows every tensor storage that lives while real code runs, on real or on fake tensors.

A fake tensor has a shape, a type and a storage of so many bytes, and no numbers. PyTorch's own code
(autograd, checkpointing, optimisers) runs on it as on a real one, only faster, so what is alive
when is known without the memory being there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass
class Trace:
    """What was allocated and freed, in order.

    `sizes`, `labels` and `phases` describe storage i: bytes, what it holds ("" = not said), and the
    phase in which it was allocated. `events` are i + 1 for an allocation, -(i + 1) for a release.
    `marks` are (number of events before it, name) of every phase.
    """

    sizes: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def find_peak(self, rounding: int = 1) -> tuple[int, int]:
        """Return (bytes, number of events up to it) of the largest sum alive; each size is rounded
        up to a multiple of `rounding` (CUDA's allocator: 512)."""
        alive = peak = at = 0
        for number, event in enumerate(self.events, start=1):
            size = -(-self.sizes[abs(event) - 1] // rounding) * rounding
            alive += size if event > 0 else -size
            if alive > peak:
                peak, at = alive, number
        return peak, at

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

    def find_phase(self, at: int) -> tuple[str, int]:
        """Return the phase of the event that was number `at`, counted from 1, and its end."""
        return next((name, end) for name, _, end in self.list_phases() if at <= end)

    def move_to_host(self, label: str, new_label: str) -> int:
        """Let the storages of that label take no bytes here; returns the bytes they had."""
        found = [i for i, own in enumerate(self.labels) if own == label]
        moved = sum(self.sizes[i] for i in found)
        for i in found:
            self.sizes[i], self.labels[i] = 0, new_label
        return moved

    def list_permanent(self, start: int) -> set[int]:
        """Return the storages that were there before event `start`, or stay after the last."""
        born = {event - 1 for event in self.events[start:] if event > 0}
        gone = {-event - 1 for event in self.events[start:] if event < 0}
        return set(range(len(self.sizes))) - (born & gone)


class StorageTracker(TorchDispatchMode):
    """Within the block every storage that an operator makes is followed until it is gone.

    `vocabulary` names the last dimension by which logits are known. `on_cuda` adds what kernels of
    CUDA do differently from the CPU's whose operators are traced (:data:`CUDA_SCRATCH`).
    """

    def __init__(self, vocabulary: int = 0, on_cuda: bool = False) -> None:
        super().__init__()
        self.trace = Trace()
        self.vocabulary, self.on_cuda = vocabulary, on_cuda
        self._live: dict[int, tuple[int, weakref.ref]] = {}
        self._phase, self._finished = "", False
        self.start_phase("load")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs a tenth of the time

    def start_phase(self, name: str) -> None:
        """What is allocated from here on belongs to phase `name`."""
        self._phase = name
        self.trace.marks.append((len(self.trace.events), name))

    def finish(self) -> None:
        """Record no more: what is freed from here on is the end of the program."""
        self._live.clear()
        self._finished = True

    def follow(self, tensor: torch.Tensor, label: str = "") -> None:
        """Follow a tensor's storage from here on, or give one that is followed a label."""
        if self._finished:
            return
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
        trace.phases.append(self._phase)
        trace.events.append(number + 1)
        return number

    def _release(self, key: int, number: int) -> None:
        if self._live.pop(key, None):
            self.trace.events.append(-number - 1)

    def _guess_label(self, tensor: torch.Tensor) -> str:
        wide = tensor.dim() > 1 and self.vocabulary and tensor.shape[-1] == self.vocabulary
        return "logits" if wide else ""

    def _pass_scratch(self, size: int) -> None:
        """What an operator allocates inside itself and gives back before it returns."""
        if size:
            self.trace.events.append(-self._allocate(size, "") - 1)

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
        if scratch is not None:
            self._pass_scratch(scratch(*args))
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
