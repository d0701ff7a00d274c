"""The model of CUDA's caching allocator, on requests that can be followed by hand."""

import pytest

from hallulib.memory.allocator import (
    MIB,
    CachingAllocator,
    OutOfMemory,
    list_requests,
    measure_requests,
    replay,
)
from hallulib.memory.tracker import Trace

pytestmark = pytest.mark.unit


def test_small_requests_share_a_segment_of_2_mib():
    done = replay([("a", 1), ("b", 600), ("c", MIB)])
    assert done.allocated == 512 + 1024 + MIB
    assert done.reserved == 2 * MIB


@pytest.mark.parametrize(
    ("size", "reserved"), [(MIB, 2), (MIB + 1, 20), (9 * MIB, 20), (10 * MIB, 10), (11 * MIB, 12)]
)
def test_a_request_gets_the_segment_of_its_size(size, reserved):
    assert replay([("a", size)]).reserved == reserved * MIB


def test_a_large_block_keeps_a_rest_of_up_to_1_mib():
    assert replay([("a", 11 * MIB)]).allocated == 12 * MIB  # 1 MiB is not split off
    assert replay([("a", 11 * MIB - 512)]).allocated == 11 * MIB - 512


def test_what_is_released_is_taken_again_smallest_first():
    allocator = replay([("a", 40 * MIB), ("b", 30 * MIB), ("a", 0), ("b", 0), ("c", 29 * MIB)])
    assert allocator.reserved == 70 * MIB
    allocator.allocate("d", 40 * MIB)
    assert allocator.reserved == 70 * MIB and allocator.peak_reserved == 70 * MIB


def test_released_neighbours_merge():
    requests = [("a", 5 * MIB), ("b", 5 * MIB), ("c", 5 * MIB), ("a", 0), ("c", 0), ("b", 0)]
    assert replay([*requests, ("d", 20 * MIB - 512)]).reserved == 20 * MIB


def test_fragments_are_reserved_and_not_to_be_used():
    requests = [(name, 5 * MIB) for name in "abcd"] + [("a", 0), ("c", 0)]
    done = replay([*requests, ("e", 9 * MIB)])
    assert (done.allocated, done.reserved) == (19 * MIB, 40 * MIB)


def test_under_a_limit_free_segments_are_given_back_before_it_is_out_of_memory():
    requests = [("a", 30 * MIB), ("a", 0), ("b", 40 * MIB)]
    assert replay(requests).peak_reserved == 70 * MIB
    assert replay(requests, 40 * MIB).peak_allocated == 40 * MIB
    with pytest.raises(OutOfMemory):
        replay(requests, 40 * MIB - 1)
    assert measure_requests(requests) == (40 * MIB, 70 * MIB, 40 * MIB)


def test_a_used_part_keeps_its_segment_from_being_given_back():
    allocator = CachingAllocator(limit=60 * MIB)
    for name in "ab":
        allocator.allocate(name, 20 * MIB)
    allocator.allocate("c", 5 * MIB)
    for name in "ac":
        allocator.release(name)
    allocator.allocate("d", 19 * MIB)
    allocator.allocate("e", 20 * MIB)
    assert allocator.reserved == 60 * MIB


def test_a_trace_is_replayed_twice_with_the_optimiser_states_between():
    # storage: 0 weights, 1 first gradient, 2 state, 3 activation, 4 gradient
    trace = Trace(
        sizes=[100, 40, 80, 60, 40], labels=[""] * 5,
        events=[1, 2, 3, -2, 4, 5, -4, -5],
        marks=[(0, "load"), (1, "first update"), (4, "forward"), (5, "backward"), (7, "update")],
    )  # fmt: skip
    own = [request for request in list_requests(trace) if not isinstance(request[0], str)]
    first = [(0, 100), ((0, 3), 60), ((0, 4), 40), ((0, 3), 0)]
    states = [(1, 40), (2, 80), (1, 0), ((0, 4), 0)]
    assert own == [*first, *states, ((1, 3), 60), ((1, 4), 40), ((1, 3), 0), ((1, 4), 0)]
