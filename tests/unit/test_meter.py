"""The meter sees memory that is really used and time that really passes."""

import json
import subprocess
import sys
import time

import pytest
import torch

from hallulib.errors import HallulibError
from hallulib.meter import PeakSampler, explain_out_of_memory, measure

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
        answers |= {"get_device_name": "a card", "is_available": True}

        def answer(*arguments, **named):
            self.calls.append((name, *arguments, *named.values()))
            return answers.get(name)

        return answer


def test_on_a_gpu_allocated_and_reserved_are_read(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    with measure("block") as meter:
        assert ("reset_peak_memory_stats",) in cuda.calls
    assert (meter.peak_cuda_bytes, meter.peak_cuda_reserved_bytes) == (7 * MB, 9 * MB)
    assert (meter.device, meter.peak_memory_bytes) == ("cuda (a card)", 7 * MB)


def test_on_an_apple_gpu_the_driver_is_asked_while_the_block_runs(monkeypatch):
    class Mps:
        @staticmethod
        def is_available():
            return True

        @staticmethod
        def driver_allocated_memory():
            return 11 * MB

    monkeypatch.setattr(torch, "mps", Mps)
    with measure("block") as meter:
        pass
    assert (meter.device, meter.peak_memory_bytes) == ("mps", 11 * MB)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_running_out_of_memory_says_what_to_lower(tmp_path, error):
    with pytest.raises(HallulibError, match=r"batch of dpo \(rows of up to 900 tokens") as caught:
        with explain_out_of_memory("dpo", 900, tmp_path / "dpo.json"):
            raise error
    assert "dpo.batch_size and raise dpo.gradient_accumulation" in str(caught.value)
    assert "GiB were in use" in str(caught.value) and "predicted" not in str(caught.value)
    assert "GPU 0" not in str(caught.value)


def test_the_prediction_and_its_advice_stand_beside_what_was_in_use(tmp_path):
    budget = tmp_path / "sft.json"
    budget.write_text(json.dumps({"needed": 3 * 2**30, "advice": "Set it smaller."}))
    said = r"3\.00 GiB were predicted\)[\s\S]*Set it smaller\. Or: "
    with pytest.raises(HallulibError, match=said), explain_out_of_memory("sft", 10, budget):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_real_allocation_that_fails_is_understood(tmp_path):
    with pytest.raises(HallulibError), explain_out_of_memory("sft", 10, tmp_path / "sft.json"):
        torch.empty(2**55)


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"):
        with explain_out_of_memory("dpo", 10, tmp_path / "dpo.json"):
            raise RuntimeError("shapes cannot be multiplied")
