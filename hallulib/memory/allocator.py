"""PyTorch's caching allocator for CUDA, replayed: what is reserved, and how little is enough.

Rules as in c10/cuda/CUDACachingAllocator.cpp with its default settings: sizes are rounded to 512
bytes; requests up to 1 MiB are cut from segments of 2 MiB, those below 10 MiB from segments of
20 MiB, larger ones get a segment rounded to 2 MiB; the smallest free block that is large enough is
taken (best fit) and split; released neighbours merge; when the card has no room for a new segment,
segments that are wholly free are given back first, and only then is it out of memory.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable

from hallulib.memory.tracker import Trace

MIB = 2**20
ROUNDING = 512
SMALL = MIB  # up to here from the pool of small blocks
# cuBLAS keeps a workspace for each thread that calls it: the main one, and autograd's.
CUBLAS_WORKSPACE = 8320 * 1024  # :4096:2:16:8, PyTorch's default below compute capability 9.0

# (bytes, address): in this order the smallest that is large enough comes first, then the lowest.
Block = tuple[int, int]
Request = tuple[Hashable, int]  # (name, bytes to allocate); 0 bytes release what the name holds


class OutOfMemory(Exception):
    """The replay needs more than the limit."""


class CachingAllocator:
    """`limit` is what the card has for it, in bytes."""

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._next = 0  # address of the next segment; no two of them touch
        self._segments: dict[int, int] = {}  # address -> bytes
        self._held: dict[Hashable, tuple[bool, Block]] = {}
        self._free: dict[bool, list[Block]] = {True: [], False: []}  # small and large, in order
        self._starts: dict[int, int] = {}  # address -> bytes free from there
        self._ends: dict[int, int] = {}  # address -> bytes free up to there

    def allocate(self, name: Hashable, size: int) -> None:
        """Take a block of at least `size` bytes. Raises OutOfMemory."""
        size = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        small = size <= SMALL
        pool = self._free[small]
        at = bisect_left(pool, (size, -1))
        block = self._take(small, pool[at]) if at < len(pool) else self._add_segment(small, size)
        rest = block[0] - size
        if rest >= ROUNDING if small else rest > SMALL:
            self._give(small, (rest, block[1] + size))
            block = (size, block[1])
        self._held[name] = small, block
        self.allocated += block[0]
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def release(self, name: Hashable) -> None:
        """Give a block back to its pool, where it merges with free neighbours."""
        small, (size, address) = self._held.pop(name)
        self.allocated -= size
        after = self._starts.get(address + size, 0)
        before = self._ends.get(address, 0)
        if after:
            self._take(small, (after, address + size))
        if before:
            self._take(small, (before, address - before))
        self._give(small, (before + size + after, address - before))

    def _give(self, small: bool, block: Block) -> None:
        size, address = block
        insort(self._free[small], block)
        self._starts[address] = self._ends[address + size] = size

    def _take(self, small: bool, block: Block) -> Block:
        size, address = block
        pool = self._free[small]
        del pool[bisect_left(pool, block)]
        del self._starts[address], self._ends[address + size]
        return block

    def _add_segment(self, small: bool, size: int) -> Block:
        large = 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        whole = 2 * MIB if small else large
        if self.reserved + whole > self.limit:
            self._return_free_segments()
            if self.reserved + whole > self.limit:
                raise OutOfMemory
        address, self._next = self._next, self._next + whole + 1
        self._segments[address] = whole
        self.reserved += whole
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return (whole, address)

    def _return_free_segments(self) -> None:
        for small, pool in self._free.items():
            for block in [b for b in pool if b[0] == self._segments.get(b[1])]:
                self.reserved -= self._take(small, block)[0]


def replay(requests: Iterable[Request], limit: float = math.inf) -> CachingAllocator:
    """Replay requests in order. Raises OutOfMemory."""
    allocator = CachingAllocator(limit)
    for name, size in requests:
        if size:
            allocator.allocate(name, size)
        else:
            allocator.release(name)
    return allocator


def measure_requests(requests: list[Request], step: int = 8 * MIB) -> tuple[int, int, int]:
    """Return what is allocated and reserved at most, and the least memory, to `step` bytes, that is
    enough: under pressure the allocator gives free segments back before it gives up."""

    def survives(limit: int) -> bool:
        try:
            replay(requests, limit)
        except OutOfMemory:
            return False
        return True

    free = replay(requests)
    limits = [*range(free.peak_allocated, free.peak_reserved, step), free.peak_reserved]
    least = bisect_left(limits, True, hi=len(limits) - 1, key=survives)
    return free.peak_allocated, free.peak_reserved, limits[least]


def list_requests(trace: Trace, accumulates: bool = False) -> list[Request]:
    """Return the requests of two passes in a row. A trace holds one, with the optimiser's states
    there from the start; in life they come with the first update, after the first pass, and lie
    between everything else."""
    parts = trace.list_phases()
    step = [name for name in ("reference", "forward", "backward") if name in parts]
    start = parts[step[0]][0]
    gone = {-event - 1 for event in trace.events[start:] if event < 0}
    stays = set(range(len(trace.sizes))) - (trace.list_born(start) & gone)
    if accumulates:
        turns = [["load", "first update", *step], [*step, "update"]]
    else:
        turns = [["load", *step, "first update", "update"], [*step, "update"]]
    workspaces = [step[0], "backward"]  # of the thread whose first call this is
    requests: list[Request] = []
    for turn, names in enumerate(turns):
        for part in names:
            if turn == 0 and part in workspaces:
                requests.append((part, CUBLAS_WORKSPACE))
            for event in trace.events[slice(*parts.get(part, (0, 0)))]:
                storage = abs(event) - 1
                name = storage if storage in stays else (turn, storage)
                if trace.sizes[storage] and not (turn and storage in stays):
                    requests.append((name, trace.sizes[storage] if event > 0 else 0))
    return requests
