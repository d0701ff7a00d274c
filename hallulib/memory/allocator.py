"""PyTorch's caching allocator for CUDA, replayed: what is reserved, and whether a limit is enough.

Rules as in c10/cuda/CUDACachingAllocator.cpp with its default settings: sizes are rounded to 512
bytes; requests up to 1 MiB are cut from segments of 2 MiB, those below 10 MiB from segments of
20 MiB, larger ones get a segment rounded to 2 MiB; the smallest free block that is large enough is
taken (best fit) and split; released neighbours merge; when the card has no room for a new segment,
segments that are wholly free are given back first, and only then is it out of memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable

from hallulib.memory.tracker import Trace

MIB = 2**20
ROUNDING = 512
SMALL = MIB  # up to here from the pool of small blocks
# cuBLAS keeps a workspace for each thread that calls it: the main one, and autograd's.
CUBLAS_WORKSPACE = 8320 * 1024  # :4096:2:16:8, PyTorch's default below compute capability 9.0


Block = tuple[int, int, int]


class OutOfMemory(Exception):
    """The replay needs more than the limit."""


class CachingAllocator:
    """`limit` is what the card has for it, in bytes; None is no limit.

    A block is (bytes, segment, address): in this order the smallest that is large enough comes
    first, then the lowest address.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._segments: list[int] = []  # bytes of each
        self._held: dict[Hashable, tuple[bool, Block]] = {}
        self._free: dict[bool, list[Block]] = {True: [], False: []}  # by pool, in order
        self._starts: dict[tuple[int, int], int] = {}  # (segment, address) -> bytes free from there
        self._ends: dict[tuple[int, int], int] = {}  # and up to there

    def allocate(self, name: Hashable, size: int) -> None:
        """Take a block of at least `size` bytes. Raises OutOfMemory."""
        size = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        small = size <= SMALL
        pool = self._free[small]
        at = bisect_left(pool, (size, -1, -1))
        block = self._take(small, pool[at]) if at < len(pool) else self._add_segment(small, size)
        whole, segment, address = block
        rest = whole - size
        if rest >= ROUNDING if small else rest > SMALL:
            self._give(small, (rest, segment, address + size))
            block = (size, segment, address)
        self._held[name] = small, block
        self.allocated += block[0]
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def release(self, name: Hashable) -> None:
        """Give a block back to its pool, where it merges with free neighbours."""
        small, (size, segment, address) = self._held.pop(name)
        self.allocated -= size
        after = self._starts.get((segment, address + size), 0)
        before = self._ends.get((segment, address), 0)
        if after:
            self._take(small, (after, segment, address + size))
        if before:
            self._take(small, (before, segment, address - before))
        self._give(small, (before + size + after, segment, address - before))

    def _give(self, small: bool, block: Block) -> None:
        size, segment, address = block
        insort(self._free[small], block)
        self._starts[segment, address] = self._ends[segment, address + size] = size

    def _take(self, small: bool, block: Block) -> Block:
        size, segment, address = block
        pool = self._free[small]
        del pool[bisect_left(pool, block)]
        del self._starts[segment, address], self._ends[segment, address + size]
        return block

    def _add_segment(self, small: bool, size: int) -> Block:
        large = 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        segment = 2 * MIB if small else large
        if self.limit is not None and self.reserved + segment > self.limit:
            self._return_free_segments()
            if self.reserved + segment > self.limit:
                raise OutOfMemory
        self._segments.append(segment)
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return (segment, len(self._segments) - 1, 0)

    def _return_free_segments(self) -> None:
        for small, pool in self._free.items():
            for block in [block for block in pool if block[0] == self._segments[block[1]]]:
                self.reserved -= self._take(small, block)[0]


def replay(requests: Iterable[tuple[Hashable, int]], limit: int | None = None) -> CachingAllocator:
    """Replay (name, bytes) in order; bytes 0 releases what `name` holds. Raises OutOfMemory."""
    allocator = CachingAllocator(limit)
    for name, size in requests:
        if size:
            allocator.allocate(name, size)
        else:
            allocator.release(name)
    return allocator


def fits(requests: Iterable[tuple[Hashable, int]], limit: int) -> bool:
    """Whether an allocator with `limit` bytes survives the replay."""
    try:
        replay(requests, limit)
    except OutOfMemory:
        return False
    return True


def list_requests(trace: Trace, accumulates: bool = False) -> list[tuple[Hashable, int]]:
    """Return the requests of two passes in a row, as (name, bytes), 0 bytes for a release.

    A trace holds one pass, with the optimiser's states there from the start. In life they come
    with the first update, after the first pass; what is kept from it lies between everything else.
    """
    parts = {name: slice(start, end) for name, start, end in trace.list_phases()}
    start = parts.get("reference", parts["forward"]).start
    gone = {-event - 1 for event in trace.events[start:] if event < 0}
    once = set(range(len(trace.sizes))) - (trace.list_born(start) & gone)
    requests: list[tuple[Hashable, int]] = []

    def emit(part: str, turn: int) -> None:
        for event in trace.events[parts[part]] if part in parts else ():
            storage = abs(event) - 1
            if storage in once and turn or not trace.sizes[storage]:
                continue
            name = storage if storage in once else (turn, storage)
            requests.append((name, trace.sizes[storage] if event > 0 else 0))

    emit("load", 0)
    if accumulates:
        emit("first update", 0)
    for turn in (0, 1):
        requests += [] if turn else [("workspace", CUBLAS_WORKSPACE)]
        emit("reference", turn)
        emit("forward", turn)
        requests += [] if turn or "backward" not in parts else [("its own", CUBLAS_WORKSPACE)]
        emit("backward", turn)
        if turn == 0 and not accumulates:
            emit("first update", 0)
        if turn or not accumulates:
            emit("update", turn)
    return requests


def find_smallest_limit(requests: list[tuple[Hashable, int]], step: int = 8 * MIB) -> int:
    """Return the least memory, to `step` bytes, in which the replay survives.

    It lies between what is allocated and what is reserved at most: under pressure the allocator
    gives free segments back before it gives up.
    """
    free = replay(requests)
    low, high = free.peak_allocated, free.peak_reserved
    while high - low > step:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(requests, middle) else (middle, high)
    return high


def replay_trace(trace: Trace, accumulates: bool) -> tuple[int, int, int]:
    """Return what a GPU allocates and reserves at most, and the least memory that is enough."""
    requests = list_requests(trace, accumulates)
    done = replay(requests)
    return done.peak_allocated, done.peak_reserved, find_smallest_limit(requests)
