"""The benchmark of the widget keeps to its limits: two seconds to open, 200 ms to the next item."""

import sys

import pytest

from hallulib.files import project_root

sys.path.insert(0, str(project_root() / "benchmarks"))
from widget_load import ITEMS, WORDS, measure_load  # noqa: E402

pytestmark = [pytest.mark.browser, pytest.mark.timeout(200)]


def test_2000_items_of_1500_words_open_in_two_seconds_and_step_in_200_ms(browser, lab):
    found = measure_load(browser, lab, ITEMS, WORDS, steps=20)
    print(found)
    assert found["open_s"] < 2 and found["again_s"] < 2
    assert found["next_ms"] < 200 and found["sentence_ms"] < 200
