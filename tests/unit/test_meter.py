"""The meter sees memory that is really used and time that really passes."""

import subprocess
import sys
import time

import pytest

from hallulib import meter as meter_module
from hallulib.meter import PeakSampler, measure

pytestmark = pytest.mark.unit

MB = 1_000_000


def test_a_block_that_holds_80_mb_for_a_while_shows_in_the_peak():
    with measure("block") as meter:
        held = bytearray(80 * MB)
        held[::4096] = b"x" * len(held[::4096])  # touch every page, else none is resident
        time.sleep(0.1)
        del held
    assert 75 * MB < meter.peak_rss_bytes - meter.rss_before_bytes < 140 * MB


def test_an_empty_block_adds_next_to_nothing():
    with measure("empty") as meter:
        time.sleep(0.05)
    assert meter.peak_rss_bytes - meter.rss_before_bytes < 5 * MB
    assert meter.peak_cuda_bytes == 0
    assert (meter.device, meter.peak_memory_bytes) == ("cpu", meter.peak_rss_bytes)


def test_the_wall_time_is_that_of_the_block():
    with measure("sleep") as meter:
        time.sleep(0.2)
    assert 0.2 <= meter.wall_seconds < 10


def test_a_block_that_raises_is_measured_all_the_same():
    with pytest.raises(ValueError), measure("raises") as meter:
        time.sleep(0.05)
        raise ValueError
    assert meter.wall_seconds >= 0.05 and meter.peak_rss_bytes > 0


def test_measuring_loads_no_torch():
    code = "import sys; from hallulib.meter import measure\nwith measure('x'): pass\n"
    check = "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code + check]).returncode == 0


def test_the_children_of_a_process_are_summed_without_the_process_itself():
    code = "x = b'x' * 60_000_000; import time; time.sleep(1)"
    sampler = PeakSampler(children=True, interval=0.02).start()
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    for child in children:
        child.wait()
    held = b"x" * 200 * MB
    peak = sampler.stop()
    del held
    assert 120 * MB < peak < 200 * MB


class FakeCuda:
    """What `measure` asks of torch.cuda, with the answers of a card."""

    def __init__(self):
        self.calls = []
        self.memory = self

    def __getattr__(self, name):
        answers = {"max_memory_allocated": 7 * MB, "max_memory_reserved": 9 * MB}
        answers["get_device_name"] = "a card"

        def answer(*arguments, **named):
            self.calls.append((name, *arguments, *named.values()))
            return answers.get(name)

        return answer


def test_on_a_gpu_allocated_and_reserved_are_read_and_the_history_is_written(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(meter_module, "_cuda", lambda: cuda)
    with measure("block", snapshot="history.pickle") as meter:
        assert cuda.calls == [("reset_peak_memory_stats",), ("_record_memory_history",)]
    assert (meter.peak_cuda_bytes, meter.peak_cuda_reserved_bytes) == (7 * MB, 9 * MB)
    assert (meter.device, meter.peak_memory_bytes) == ("cuda (a card)", 7 * MB)
    assert ("_dump_snapshot", "history.pickle") in cuda.calls
    assert cuda.calls[-2] == ("_record_memory_history", None)


def test_on_an_apple_gpu_the_driver_is_asked_while_the_block_runs(monkeypatch):
    class Mps:
        @staticmethod
        def driver_allocated_memory():
            return 11 * MB

    monkeypatch.setattr(meter_module, "_mps", lambda: Mps)
    with measure("block") as meter:
        pass
    assert (meter.device, meter.peak_memory_bytes) == ("mps", 11 * MB)
