"""What fits, how far it reaches, what it costs, and the refusal of what does not."""

import dataclasses
import json
import time

import pytest
import yaml
from tiny_model import make_recipe, start_run
from transformers import AutoConfig

from hallulib.cli import main
from hallulib.errors import DataError, RecipeError
from hallulib.memory import (
    budget,
    find_reach,
    load_model_config,
    measure_rate,
    planner,
    predict_peak,
)
from hallulib.memory.counts import count_parameters
from hallulib.memory.peak import GIB, change_recipe
from hallulib.recipe import load_recipe

pytestmark = pytest.mark.unit

LLAMA = AutoConfig.for_model(
    "llama", vocab_size=99, num_attention_heads=4, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, max_position_embeddings=4096,
)  # fmt: skip
SFT = predict_peak(LLAMA, load_recipe("tiny-cpu"), "sft", tokens=512)


@pytest.mark.parametrize("card", [1.5, 2.0, 2.1, 3.9, 8.0, 40.0])
def test_the_search_finds_what_trying_every_count_finds(card):
    replays = []

    def predict(count, replay):
        size = int((1.0 + 0.25 * count) * GIB)
        replays.append(replay)
        needed = size + GIB // 5 if replay else None  # the allocator holds more than what lives
        terms = dict.fromkeys(SFT.terms, 0) | {"logits": size}
        return dataclasses.replace(SFT, terms=terms, allocated=size, needed=needed)

    found = find_reach(predict, card, 64)
    expected = [count for count in range(1, 65) if predict(count, True).fits(card)]
    assert found == max(expected, default=0)
    assert replays[:-64].count(True) <= 2  # the slow question is asked last


def test_the_longest_sequence_fits_and_the_next_does_not():
    recipe = load_recipe("tiny-cpu")

    def predict(count, replay):
        asked = {"tokens": 64 * count, "rows": 8, "replay": replay}
        return predict_peak(LLAMA, recipe, "cached_reference_pass2", **asked)

    longest = find_reach(predict, 0.9, 64)
    assert 1 < longest < 64
    assert predict(longest, True).fits(0.9) and not predict(longest + 1, True).fits(0.9)
    assert find_reach(predict, 0.5, 64) == 0


def test_a_card_is_found_by_name_or_size_and_a_wrong_one_is_named():
    find_card = planner.find_card
    assert find_card("12GB")["memory_gb"] == find_card("12")["memory_gb"] == 12
    assert find_card("rtx 5070")["memory_gb"] == 12
    assert find_card("T4")["source"].startswith("Mistral-7B")
    with pytest.raises(RecipeError, match="no card 'RTX 5071'. Did you mean 'RTX 5070'"):
        find_card("RTX 5071")


def test_a_setting_keeps_the_pairs_per_step_and_everything_in_it_fits():
    recipe = make_recipe()
    config = load_model_config(recipe.model.name_or_path)
    lengths = {"tokens": 128, "completion": 64}
    changes, passes = planner.find_setting(config, recipe, 1.0, lengths)
    changed = change_recipe(recipe, changes)
    assert changed.dpo.batch_size * changed.dpo.gradient_accumulation == 4
    assert changed.model.quantization == "none" and not changed.model.gradient_checkpointing
    assert [b.strategy for b in passes] == list(planner.PASSES)
    assert all(budget.fits(0.95) for budget in passes)
    with pytest.raises(RecipeError, match="Nothing fits in 0.5 GiB: the least is"):
        planner.find_setting(config, recipe, 0.5, lengths)


def test_hours_come_from_the_published_rate_and_only_from_there():
    card, steps = planner.find_card("T4"), {"sft.max_steps": 10, "sft.batch_size": 100}
    recipe = load_recipe("tiny-cpu", steps | {"model.gradient_checkpointing": True})
    hours = planner.estimate_hours(SFT, recipe, 10**9, card["rate"])
    # The T4 trained 1,024 tokens of 7.248e9 parameters in 3.9 s; here are 1,000 rows of 512.
    assert hours == pytest.approx(1000 * 3.9 / 7.248 / 3600 / 2)
    kept = change_recipe(recipe, {"model.gradient_checkpointing": False})
    spared = planner.estimate_hours(SFT, kept, 10**9, card["rate"])
    assert spared == pytest.approx(hours * 2 / 3)  # nothing is computed a second time
    lines = planner.describe_passes(planner.find_card("L4"), [SFT], recipe, 10**9)
    assert "No rate is known for this card" in lines[-1] and " h" not in lines[0]


def test_a_price_is_told_with_its_source_and_its_day():
    found = planner.load_cards()
    priced = [card for card in found if card.get("price_per_hour")]
    assert priced and all(c["price_source"] and c["as_of"] and c["currency"] for c in priced)
    assert all(card["source"] for card in found if card.get("rate"))
    card, recipe = planner.find_card("A100 80GB"), load_recipe("tiny-cpu")
    text = "\n".join(planner.describe_passes(card, [SFT], recipe, 10**12))
    price = planner.estimate_hours(SFT, recipe, 10**12, card["rate"]) * card["price_per_hour"]
    assert price > 0.1 and f"Cost about {price:.2f} USD (runpod.io/pricing" in text
    assert str(card["as_of"]) in text and "Hours are no promise" in text


def test_the_rate_times_the_time_of_a_step_is_the_work_of_a_step(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # a step takes 1 second
    weights = count_parameters(planner.TIMED_SHAPE, make_recipe()).linear
    assert weights > 40e6
    assert measure_rate() == 4 * weights * planner.TIMED_TOKENS


def test_the_command_prints_a_plan_and_writes_a_recipe_that_loads(tmp_path, capsys):
    recipe = make_recipe()
    base, out = recipe.model.name_or_path, tmp_path / "planned.yaml"
    main_without_exit(["plan", "--model", base, "--gpu", "1GB", "--recipe", "tiny-cpu",
                       "--out", str(out)])  # fmt: skip
    printed = capsys.readouterr().out
    assert "1 GiB card" in printed and "cached reference, pass 2" in printed
    planned = load_recipe(str(out))
    assert planned.name == "planned" and planned.model.name_or_path == base
    assert yaml.safe_load(out.read_text())["model"]["dtype"] == "bfloat16"


def main_without_exit(arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0


@pytest.mark.parametrize("text", ["", "{}", '{"splits": {"train": {}}}', "[1]"])
def test_data_without_token_counts_is_refused(tmp_path, text):
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(DataError, match="holds no token counts"):
        planner.read_audit(str(tmp_path / "audit.json"))


def test_the_command_line_asks_before_a_stage_starts(tmp_path, monkeypatch, capsys):
    recipe = make_recipe()
    start_run(tmp_path / "run", recipe)
    monkeypatch.setattr(budget, "read_free_bytes", lambda device: 1000)
    settings = [f"--set={key}={value}" for key, value in (
        ("model.name_or_path", recipe.model.name_or_path), ("model.max_length", 160),
    )]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(["run-stage", "sft", "--run-dir", str(tmp_path / "run"), *settings])
    assert end.value.code == 1
    assert "--force starts anyway" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert "sft" not in manifest["stages"]
