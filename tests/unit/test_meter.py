"""The meter sees memory that is really used and time that really passes."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from hallulib import meter
from hallulib.errors import HallulibError
from hallulib.meter import explain_out_of_memory, measure, sample_peak

pytestmark = pytest.mark.unit

MB = 1_000_000


def test_a_block_that_holds_80_mb_for_a_while_shows_in_the_peak_and_an_empty_one_does_not():
    before = psutil.Process().memory_info().rss
    with measure() as empty:
        time.sleep(0.2)
    assert empty["peak_memory_bytes"] - before < 5 * MB
    assert 0.2 <= empty["wall_seconds"] < 10
    assert (empty["device"], empty["reserved_bytes"]) == ("cpu", 0)
    with measure() as found:
        held = bytearray(80 * MB)
        held[::4096] = b"x" * len(held[::4096])  # touch every page, else none is resident
        time.sleep(0.1)
        del held
    assert 75 * MB < found["peak_memory_bytes"] - before < 140 * MB


def test_a_block_that_raises_is_measured_all_the_same():
    with pytest.raises(ValueError), measure() as found:
        time.sleep(0.05)
        raise ValueError
    assert found["wall_seconds"] >= 0.05 and found["peak_memory_bytes"] > 0


def test_measuring_loads_no_torch():
    code = "import sys; from hallulib.meter import measure\nwith measure(): pass\n"
    check = "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code + check]).returncode == 0


def test_the_children_of_a_process_are_summed_without_the_process_itself():
    code = "x = b'x' * 60_000_000; import time; time.sleep(1)"
    with sample_peak(children=True) as peak:
        children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        for child in children:
            child.wait()
        held = b"x" * 200 * MB
    del held
    assert 120 * MB < peak["bytes"] < 200 * MB


def test_on_a_gpu_allocated_and_reserved_are_read(monkeypatch):
    resets = []
    cuda = SimpleNamespace(
        reset_peak_memory_stats=lambda: resets.append(1),
        synchronize=lambda: None,
        max_memory_allocated=lambda: 7 * MB,
        max_memory_reserved=lambda: 9 * MB,
        get_device_name=lambda: "a card",
    )
    monkeypatch.setattr(meter, "_loaded", {"cuda": cuda}.get)
    with measure() as found:
        assert resets == [1]
    assert (found["peak_memory_bytes"], found["reserved_bytes"]) == (7 * MB, 9 * MB)
    assert found["device"] == "cuda (a card)"


def test_on_an_apple_gpu_the_driver_is_asked(monkeypatch):
    mps = SimpleNamespace(driver_allocated_memory=lambda: 11 * MB)
    monkeypatch.setattr(meter, "_loaded", {"mps": mps}.get)
    with measure() as found:
        pass
    assert (found["device"], found["peak_memory_bytes"]) == ("mps", 11 * MB)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_running_out_of_memory_says_what_to_lower_and_what_was_predicted(tmp_path, error):
    for stage, said in (("dpo", " and raise dpo.gradient_accumulation"), ("reference", ",")):
        with pytest.raises(HallulibError, match=rf"batch of {stage} \(rows of up to 90") as caught:
            with explain_out_of_memory(stage, 90, tmp_path / "budget.json"):
                raise error
        assert caught.value.next_step.startswith(f"Lower {stage}.batch_size{said}")
        assert "predicted" not in str(caught.value) and "GPU 0" not in str(caught.value)
    told = {"needed": 3 * 2**30, "advice": "Set it smaller."}
    (tmp_path / "budget.json").write_text(json.dumps(told))
    with pytest.raises(HallulibError, match=r"3\.00 GiB were predicted\)\nNext: Set it smaller"):
        with explain_out_of_memory("sft", 90, tmp_path / "budget.json"):
            raise error


def test_a_real_allocation_that_fails_is_understood_and_other_errors_pass(tmp_path):
    with pytest.raises(HallulibError), explain_out_of_memory("sft", 10, tmp_path / "sft.json"):
        torch.empty(2**55)
    with pytest.raises(RuntimeError, match="shapes"):
        with explain_out_of_memory("dpo", 10, tmp_path / "dpo.json"):
            raise RuntimeError("shapes cannot be multiplied")
