"""What fits, how it is searched, and the refusal of what does not."""

import json

import pytest
from tiny_model import make_recipe, start_run

from hallulib.cli import main
from hallulib.errors import DataError, RecipeError
from hallulib.memory import budget
from hallulib.recipe import load_recipe

pytestmark = pytest.mark.unit


def test_a_card_is_found_by_name_or_size_and_a_wrong_one_is_named():
    assert budget.find_card("12GB") == budget.find_card("12") == ("a card", 12)
    assert budget.find_card("rtx 5070") == ("RTX 5070", 12)
    with pytest.raises(RecipeError, match="no card 'RTX 5071'. Did you mean 'RTX 5070'"):
        budget.find_card("RTX 5071")


def test_a_setting_keeps_the_pairs_per_step_and_everything_in_it_fits():
    lengths = {"tokens": 128, "completion": 64}
    changes, passes = budget.find_setting(make_recipe(), 1.0, lengths)
    changed = budget.change_recipe(make_recipe(), changes)
    assert changed.dpo.batch_size * changed.dpo.gradient_accumulation == 4
    assert changed.model.quantization == "none" and not changed.model.gradient_checkpointing
    assert [b.strategy for b in passes] == list(budget.PASSES)
    assert all(b.fits(0.95) for b in passes)
    with pytest.raises(RecipeError, match="Nothing fits in 0.5 GiB: the least is"):
        budget.find_setting(make_recipe(), 0.5, lengths)


def test_the_fastest_setting_that_fits_is_taken(monkeypatch):
    """A model that fits when it is packed only: all unpacked settings are tried before."""
    tried = []

    def predict(recipe, name, replay, **lengths):
        tried.append((recipe.model.quantization, recipe.dpo.batch_size))
        fits = recipe.model.quantization == "nf4" and recipe.dpo.batch_size <= 2
        return make_budget(name, 1.0 if fits else 100.0)

    monkeypatch.setattr(budget, "predict_peak", predict)
    changes, passes = budget.find_setting(make_recipe(), 12, {"tokens": 64, "completion": 32})
    assert changes["model.quantization"] == "nf4" and changes["dpo.batch_size"] == 2
    assert not changes["model.gradient_checkpointing"] and len(passes) == 3
    assert tried[0] == ("none", 4)


def make_budget(name, gib):
    terms = {"base_weights": int(gib * 2**30), "cuda_context": 0}
    size = terms["base_weights"]
    return budget.MemoryBudget(name, name, 1, 64, "backward", terms, size, size, size)


def test_without_data_rows_are_as_long_as_the_recipe_allows():
    lengths, source = budget.read_lengths(make_recipe(), None)
    assert lengths == {"tokens": 160, "completion": 80} and source == "model.max_length"


def run_command(arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def test_the_command_prints_a_plan_and_writes_a_recipe_that_loads(tmp_path, capsys):
    base, out = make_recipe().model.name_or_path, tmp_path / "planned.yaml"
    (tmp_path / "audit.json").write_text(
        '{"splits": {"train": {"total_tokens": {"max": 99}, "reference_tokens": {"max": 40}}}}'
    )
    asked = ["--model", base, "--gpu", "1GB", "--recipe", "tiny-cpu", "--out", str(out)]
    assert run_command(["plan", *asked, "--data", str(tmp_path / "audit.json")]) == 0
    printed = capsys.readouterr().out
    assert "a card, 1 GiB" in printed and "rows of 99 tokens (longest training rows" in printed
    assert "cached reference, pass 2: training: 0.8 GiB, most of it cuda context" in printed
    planned = load_recipe(str(out)).model
    assert planned.name_or_path == base and planned.max_length == 99
    assert (planned.device, planned.dtype) == ("cuda", "bfloat16")


@pytest.mark.parametrize("text", ["", "{}", '{"splits": {"train": {}}}', "[1]"])
def test_data_without_token_counts_is_refused(tmp_path, text):
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(DataError, match="holds no token counts"):
        budget.read_lengths(make_recipe(), tmp_path / "audit.json")


def test_the_command_line_asks_before_a_stage_starts(tmp_path, monkeypatch, capsys):
    recipe = make_recipe()
    start_run(tmp_path / "run", recipe)
    monkeypatch.setattr(budget, "read_free_bytes", lambda recipe: 1000)
    settings = {"model.name_or_path": recipe.model.name_or_path, "model.max_length": 160}
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    assert run_command(["run-stage", "sft", "--run-dir", str(tmp_path / "run"), *sets]) == 2
    assert "--force starts anyway" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert "sft" not in manifest["stages"]
