"""The speed of this machine, measured on a few steps, and what follows from it."""

from __future__ import annotations

import time

import pytest
from tiny_model import make_recipe

from hallulib.memory import calibrate
from hallulib.memory.counts import count_parameters

pytestmark = pytest.mark.unit


def test_the_rate_times_the_time_of_a_step_is_the_work_of_a_step(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # a step takes 1 second
    weights = count_parameters(calibrate.SHAPE, make_recipe().lora).linear
    assert weights > 40e6
    assert calibrate.measure_rate() == 4 * weights * calibrate.TOKENS


def test_days_are_work_over_rate():
    # 8 billion parameters, a million tokens, three passes: 48e15 operations
    assert calibrate.project_days(8_000_000_000, 1_000_000, 3, 1e12) == pytest.approx(48e3 / 86400)
