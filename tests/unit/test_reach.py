"""How far a card reaches: what ships is what the search finds, and a step further is too far."""

from __future__ import annotations

import json

import pytest

from hallulib.memory.counts import load_model_config
from hallulib.memory.peak import predict_peak
from hallulib.memory.planner import STEP
from hallulib.memory.prediction_cache import decisive_versions
from hallulib.memory.reach import SHIPPED, STRATEGY, read_reach
from hallulib.memory.table import CARDS_GB, MODELS, make_large_recipe

pytestmark = pytest.mark.unit


def test_every_model_and_card_is_there_and_a_larger_card_reaches_at_least_as_far():
    found = {(row["model"], row["card_gb"]): row for row in read_reach()}
    assert set(found) == {(model, card) for model in MODELS for card in CARDS_GB}
    for model in MODELS:
        for name in ("longest", "batch"):
            reached = [found[model, card][name] for card in CARDS_GB]
            assert reached == sorted(reached)


def test_the_longest_pair_fits_and_one_step_longer_does_not():
    row = next(r for r in read_reach() if "Mistral" in r["model"] and r["card_gb"] == 8)
    config = load_model_config(row["model"])
    recipe = make_large_recipe(row["model"], gradient_checkpointing=True)
    fits = [
        predict_peak(config, recipe, STRATEGY, sequence_tokens=tokens).fits(8)
        for tokens in (row["longest"], row["longest"] + STEP)
    ]
    assert fits == [True, False]


def test_the_table_was_made_with_the_libraries_that_are_pinned():
    assert json.loads(SHIPPED.read_text("utf-8"))["libraries"] == decisive_versions()
