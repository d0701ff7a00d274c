"""What fits, how far it reaches, and the refusal of what does not."""

import dataclasses
import json

import pytest
import yaml
from tiny_model import make_recipe, start_run
from transformers import AutoConfig

from hallulib.cli import main
from hallulib.errors import DataError, HallulibError, RecipeError
from hallulib.memory import cards, check_fits, load_model_config, planner, predict_peak, preflight
from hallulib.memory.peak import GIB, change_recipe
from hallulib.memory.table import predict_large
from hallulib.recipe import load_recipe

pytestmark = pytest.mark.unit

EXAMPLE = predict_large("Qwen/Qwen2.5-0.5B-Instruct", "cached_reference_pass2", 512)
CONTEXT = EXAMPLE.terms["cuda_context"]


def needing(count, weights=1.0, each=0.25, bend=0.0):
    """A prediction that needs `weights + each * count` GiB, and more where the line is bent."""
    size = int((weights + each * count + bend * count**2) * GIB)
    return dataclasses.replace(EXAMPLE, needed=size)


@pytest.mark.parametrize("bend", [0.0, 0.001, 0.05])
@pytest.mark.parametrize("card", [1.5, 2.0, 2.1, 3.9, 8.0, 40.0])
def test_the_search_finds_what_trying_every_count_finds(card, bend):
    tried = []

    def need(count):
        tried.append(count)
        return needing(count, bend=bend)

    found = planner.search_largest(need, card, 64)
    expected = [n for n in range(1, 65) if needing(n, bend=bend).fits(card)]
    assert found == max(expected, default=0)
    assert len(tried) <= 12


def test_the_longest_sequence_fits_and_the_next_does_not():
    config = AutoConfig.for_model(
        "llama", vocab_size=99, num_attention_heads=4, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, max_position_embeddings=4096,
    )  # fmt: skip
    recipe = load_recipe("tiny-cpu", {"dpo.batch_size": 8})
    card = 0.9
    longest = planner.find_longest_sequence(config, recipe, "cached_reference_pass2", card)
    assert 64 < longest < 4096 and longest % 64 == 0
    for tokens, fits in ((longest, True), (longest + 64, False)):
        budget = predict_peak(config, recipe, "cached_reference_pass2", sequence_tokens=tokens)
        assert budget.fits(card) == fits
    assert planner.find_largest_batch(config, recipe, "sft", 0.5) == 0


def test_a_card_is_found_by_name_or_size_and_a_wrong_one_is_named():
    assert cards.find_card("12GB").memory_gb == cards.find_card("12").memory_gb == 12
    assert cards.find_card("rtx 5070").memory_gb == 12
    assert cards.find_card("T4").source.startswith("Mistral-7B")
    with pytest.raises(RecipeError, match="no card 'RTX 5071'. Did you mean 'RTX 5070'"):
        cards.find_card("RTX 5071")


def test_a_plan_keeps_the_pairs_per_step_and_everything_in_it_fits():
    recipe = make_recipe()
    config = load_model_config(recipe.model.name_or_path)
    plan = planner.make_plan(config, recipe, cards.Card("a card", 1.0), 128, 64)
    changed = change_recipe(recipe, plan.changes)
    assert changed.dpo.batch_size * changed.dpo.gradient_accumulation == 4
    assert changed.model.quantization == "none" and not changed.model.gradient_checkpointing
    assert all(budget.fits(0.95) for budget in plan.passes) and len(plan.passes) == 3
    with pytest.raises(RecipeError, match="Nothing fits in 0.5 GiB: the least is"):
        planner.make_plan(config, recipe, cards.Card("a small card", 0.5), 128, 64)


def test_hours_come_from_the_published_rate_and_only_from_there():
    plan = planner.Plan(cards.find_card("T4"), {}, [EXAMPLE])
    rows = {EXAMPLE.strategy: 1000}
    (hours,) = planner.estimate_hours(plan, 10**9, rows).values()
    # The T4 trained 1,024 tokens of 7.248e9 parameters in 3.9 s; a pair has two sides of 512.
    assert hours == pytest.approx(1000 * 3.9 / 7.248 / 3600)
    kept = planner.Plan(plan.card, {}, [dataclasses.replace(EXAMPLE, checkpointing=False)])
    (spared,) = planner.estimate_hours(kept, 10**9, rows).values()
    assert spared == pytest.approx(hours * 2 / 3)  # nothing is computed a second time
    assert planner.estimate_hours(planner.Plan(cards.find_card("L4"), {}, []), 1, {}) == {}


def test_a_price_is_told_with_its_source_and_its_day():
    found = cards.load_cards()
    priced = [card for card in found if card.price_per_hour]
    assert priced and all(c.price_source and c.as_of and c.currency for c in priced)
    assert all(card.source for card in found if card.rate)
    plan = planner.Plan(cards.find_card("A100 80GB"), {}, [EXAMPLE])
    text = planner.describe_plan(plan, {EXAMPLE.strategy: 2.0}, {})
    assert f"Cost about {2 * plan.card.price_per_hour:.2f} USD (runpod.io/pricing" in text
    assert str(plan.card.as_of) in text and "Hours are no promise" in text


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


def test_a_stage_that_cannot_fit_is_refused_and_force_starts_it(tmp_path, monkeypatch):
    recipe = make_recipe()
    run = start_run(tmp_path / "run", recipe)
    fitting = check_fits(recipe, run, "sft")
    assert fitting.strategy == "sft" and fitting.device == "cpu"
    assert check_fits(recipe, run, "evaluation") is None
    monkeypatch.setattr(preflight, "read_free_bytes", lambda device: 1000)
    with pytest.raises(HallulibError, match="sft would need .* GiB are free") as refusal:
        check_fits(recipe, run, "sft")
    assert "sft.batch_size" in str(refusal.value) or "checkpointing" in str(refusal.value)
    assert check_fits(recipe, run, "sft", force=True) == fitting


def test_the_command_line_asks_before_a_stage_starts(tmp_path, monkeypatch, capsys):
    recipe = make_recipe()
    start_run(tmp_path / "run", recipe)
    monkeypatch.setattr(preflight, "read_free_bytes", lambda device: 1000)
    settings = [f"--set={key}={value}" for key, value in (
        ("model.name_or_path", recipe.model.name_or_path), ("model.max_length", 160),
    )]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(["run-stage", "sft", "--run-dir", str(tmp_path / "run"), *settings])
    assert end.value.code == 1
    assert "--force starts anyway" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert "sft" not in manifest["stages"]
