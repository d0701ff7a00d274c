"""Sequential DPO: it starts at ln 2, trains the adapter only, resumes exactly; every gate fires."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny_dpo import BOTH, Interrupted, build_trainer, reference_run, stop_at, weights
from tiny_model import make_recipe, record_pairs, start_run, write_base_model

from hallulib.adapters import attach_adapter
from hallulib.dpo import gates
from hallulib.dpo.arms import train_comparison_arms
from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.reference import cache_reference
from hallulib.dpo.step import Arm
from hallulib.dpo.train import load_dpo_result, train_dpo
from hallulib.dpo.trainer import SequentialDPOTrainer
from hallulib.errors import GateFailed
from hallulib.files import sha256_tree
from hallulib.metrics_log import read_metrics
from hallulib.models import load_base_model, load_policy
from hallulib.sft import train_sft
from hallulib.training import find_last_checkpoint

pytestmark = pytest.mark.unit


def test_training_starts_at_ln_2_and_raises_the_validation_margin(tmp_path):
    recipe, run = reference_run(tmp_path / "run", {"dpo.learning_rate": 5e-3})
    result = train_dpo(recipe, run)
    rows = read_metrics(run.require("dpo/metrics.jsonl"))
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 3, 6]
    assert evaluated[0]["eval_dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert evaluated[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert evaluated[-1]["eval_rewards/margins"] > 0.05
    assert evaluated[-1]["eval_rewards/accuracies"] == 1.0
    step = next(row for row in rows if row["step"] == 2 and "loss" in row)
    names = ("chosen", "rejected", "accuracies", "margins")
    assert {f"rewards/{name}" for name in names} <= set(step)
    assert {"logps/chosen", "logps/rejected", "grad_norm", "learning_rate"} <= set(step)
    assert step["loss"] == pytest.approx(step["dpo_loss"] + step["sft_loss"], abs=1e-5)
    assert result.notes["start_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert result.notes["lora_tensors"] == 28
    assert load_dpo_result(run) == result


def test_only_the_adapter_has_changed_and_it_is_still_one_of_the_same_size(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    base = sha256_tree(recipe.model.name_or_path)
    train_dpo(recipe, run)
    before, after = weights(run, "sft/adapter"), weights(run)
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert sha256_tree(recipe.model.name_or_path) == base


def test_the_saved_adapter_is_the_last_step_and_the_best_stays_in_checkpoints(
    tmp_path, monkeypatch
):
    recipe, run = reference_run(tmp_path / "run")
    original = SequentialDPOTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        metrics = original(self, *args, **kwargs)
        metrics["eval_loss"] = float(self.state.global_step + 1)
        return metrics

    monkeypatch.setattr(SequentialDPOTrainer, "evaluate", evaluate)
    result = train_dpo(recipe, run)
    assert result.notes["best_step"] == 3
    folder = run.checkpoint_dir("dpo", recipe)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    last = load_file(folder / "checkpoint-6/adapter_model.safetensors")
    assert all(torch.equal(last[name], value) for name, value in weights(run).items())


def test_an_interrupted_run_resumes_to_exactly_the_same_weights(tmp_path, monkeypatch, capsys):
    recipe, straight = reference_run(tmp_path / "straight")
    train_dpo(recipe, straight)
    recipe, broken = reference_run(tmp_path / "broken")
    with monkeypatch.context() as patch:
        stop_at(patch, step=5)
        with pytest.raises(Interrupted):
            train_dpo(recipe, broken)
    assert "dpo" not in broken.manifest["stages"]
    train_dpo(recipe, broken)
    assert "checkpoint-4" in capsys.readouterr().out
    a, b = weights(straight), weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_metrics(straight.path("dpo/metrics.jsonl")) == read_metrics(
        broken.path("dpo/metrics.jsonl")
    )


def test_a_checkpoint_made_against_another_reference_is_not_resumed(tmp_path, monkeypatch):
    recipe, run = reference_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, step=5)
        with pytest.raises(Interrupted):
            train_dpo(recipe, run)
    file = run.checkpoint_dir("dpo", recipe) / "checkpoint-4/reference.json"
    assert len(json.loads(file.read_text())["reference_key"]) == 64
    file.write_text(json.dumps({"reference_key": "0" * 64}))
    with pytest.raises(GateFailed, match=r"trained against reference 000000000000"):
        train_dpo(recipe, run)
    file.unlink()
    with pytest.raises(GateFailed, match="trained against reference none"):
        train_dpo(recipe, run)


def test_a_wrong_reference_is_caught_before_the_first_step(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    right = build_trainer(recipe, run, tmp_path / "a").check_gates()
    assert right["start_loss"] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(GateFailed, match=r"not ln 2 = 0.6931"):
        build_trainer(recipe, run, tmp_path / "b", shift=0.05).check_gates()


def test_the_base_model_as_reference_is_caught(tmp_path):
    # The cache is the SFT policy's; a policy with a fresh adapter is the base model.
    recipe, run = reference_run(tmp_path / "run", {"sft.max_steps": 4})
    fresh = attach_adapter(load_base_model(recipe), recipe)
    with pytest.raises(GateFailed, match="LoRA tensor .* is not the SFT adapter's"):
        gates.check_adapter_file(fresh, run.require("sft/adapter"))
    with pytest.raises(GateFailed, match="made with another adapter_weights"):
        build_trainer(recipe, run, tmp_path / "a", policy=fresh)


def test_a_frozen_adapter_and_a_trainable_base_weight_are_caught(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=True)
    name, parameter = next((n, p) for n, p in policy.named_parameters() if "lora_A" in n)
    parameter.requires_grad_(False)
    with pytest.raises(GateFailed, match="is frozen"):
        build_trainer(recipe, run, tmp_path / "a", policy=policy).check_gates()
    parameter.requires_grad_(True)
    policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(GateFailed, match="norm.weight would be trained"):
        build_trainer(recipe, run, tmp_path / "b", policy=policy).check_gates()


def test_a_second_adapter_is_caught(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=True)
    gates.check_single_adapter(policy)
    policy.load_adapter(str(run.require("sft/adapter")), "again")
    with pytest.raises(GateFailed, match="default.*again"):
        gates.check_single_adapter(policy)
    with pytest.raises(GateFailed):
        gates.check_single_adapter(load_base_model(recipe))


def test_a_lora_layer_within_a_lora_layer_is_caught(tmp_path):
    from peft import LoraConfig, get_peft_model

    recipe, run = reference_run(tmp_path / "run")
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=True)
    doubled = get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(GateFailed, match="within the LoRA layer"):
        gates.check_single_adapter(doubled)


def test_empty_and_identical_completions_are_caught():
    good = TokenPair([1, 2], [3, 9], [4, 9])
    gates.check_pairs([good])
    for bad in (TokenPair([1, 2], [9], [4, 9]), TokenPair([1, 2], [3, 9], [9])):
        with pytest.raises(GateFailed, match="Pair 1 has an empty side"):
            gates.check_pairs([good, bad])
    with pytest.raises(GateFailed, match="identical"):
        gates.check_pairs([TokenPair([1, 2], [3, 9], [3, 9])])


@pytest.mark.parametrize("shared", [False, True])
def test_scoring_the_prompt_or_from_the_wrong_place_is_caught(shared):
    pairs = [TokenPair([1, 2], [3, 9], [4, 5, 9])]
    batch = collate_pairs(pairs, 0, shared)
    gates.check_scored_tokens(batch, pairs)
    faults = (("predictors", 0, 0, 0), ("targets", 0, 2, 0), ("targets", 3, 4, 1))
    for name, at, value, row in faults:
        wrong = batch | {name: batch[name].clone()}
        wrong[name][at] = value
        with pytest.raises(GateFailed, match=f"Completion {row} of the first batch"):
            gates.check_scored_tokens(wrong, pairs)


def test_dropout_is_off_in_training(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=True)
    for module in policy.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    trainer = build_trainer(recipe, run, tmp_path / "a", policy=policy)
    policy.train()
    batch = trainer.collate(trainer.longest)
    assert torch.equal(*(trainer.measure(trainer.model, batch)[0] for _ in range(2)))
    assert trainer.check_gates()["start_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_gates_run_on_the_longest_batch(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    trainer = build_trainer(recipe, run, tmp_path / "a")
    lengths = sorted((row["pair"].length for row in set_of_rows(trainer)), reverse=True)
    assert [row["pair"].length for row in trainer.longest] == lengths[:4]


def set_of_rows(trainer):
    return {row["pair"].address: row for row in trainer.train_dataset}.values()


def test_arms_see_the_same_pairs_in_the_same_order_and_differ_in_the_loss(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    arms = [BOTH, Arm("dpo_plain", True, 0.0), Arm("sft_on_chosen", False, 1.0)]
    trainers = [build_trainer(recipe, run, tmp_path / arm.name, arm) for arm in arms]
    orders = [[row["pair"].address for row in t.train_dataset] for t in trainers]
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 24
    batch = trainers[0].collate(trainers[0].longest)
    both, plain, chosen = (t.measure(t.model.train(), batch)[0].item() for t in trainers)
    assert plain == pytest.approx(math.log(2), abs=1e-5)
    assert both == pytest.approx(plain + chosen, abs=1e-5)
    # The control is evaluated on both sides all the same.
    assert "rewards/margins" in trainers[2].measure(trainers[2].model.eval(), batch)[1]


def test_comparison_arms_are_trained_and_a_finished_one_is_not_trained_twice(
    tmp_path, monkeypatch, capsys
):
    recipe, run = reference_run(tmp_path / "run", {"dpo.max_steps": 2, "dpo.guardrail_notes": 0})
    run.path("dpo/arms/old").mkdir(parents=True)
    with monkeypatch.context() as patch:
        stop_at(patch, step=2, label="sft_on_chosen")
        with pytest.raises(Interrupted):
            train_comparison_arms(recipe, run)
    plain = weights(run, "dpo/arms/dpo_plain/adapter")
    results = train_comparison_arms(recipe, run)
    assert "dpo_plain is finished, reusing" in capsys.readouterr().out
    assert list(results) == ["dpo_plain", "sft_on_chosen"]
    assert sorted(p.name for p in run.require("dpo/arms").iterdir()) == sorted(results)
    assert all(
        torch.equal(plain[n], v) for n, v in weights(run, "dpo/arms/dpo_plain/adapter").items()
    )
    other = weights(run, "dpo/arms/sft_on_chosen/adapter")
    assert not all(torch.equal(plain[name], other[name]) for name in plain)
    assert (
        results["dpo_plain"].metrics["eval_loss"] != results["sft_on_chosen"].metrics["eval_loss"]
    )
    assert train_comparison_arms(recipe, run) == results


def test_no_comparison_arms_is_an_empty_folder(tmp_path):
    recipe, run = reference_run(tmp_path / "run", {"dpo.comparison_arms": []})
    assert train_comparison_arms(recipe, run) == {}
    assert list(run.require("dpo/arms").iterdir()) == []


def test_pairs_that_are_left_out_are_counted(tmp_path):
    recipe, run = reference_run(tmp_path / "run", {"dpo.max_steps": 1, "dpo.guardrail_notes": 0})
    frame = pd.read_parquet(run.path("pairs/train.parquet"))
    assert train_dpo(recipe, run).notes["pairs"] == len(frame) == 10


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_weights_go_through_sft_reference_and_dpo_and_start_at_ln_2(
    tmp_path, quantization
):
    pytest.importorskip("bitsandbytes")
    base = write_base_model(tmp_path / "base", hidden_size=64, num_key_value_heads=4)
    small = {"model.quantization": quantization, "model.dtype": "bfloat16"}
    short = {"dpo.max_steps": 1, "sft.max_steps": 1, "dpo.guardrail_notes": 0}
    recipe = make_recipe(small | short, base)
    run = start_run(tmp_path / "run", recipe)
    train_sft(recipe, run)
    record_pairs(run, recipe)
    cache_reference(recipe, run)
    result = train_dpo(recipe, run)
    assert result.notes["start_loss"] == pytest.approx(math.log(2), abs=0.01)
    assert result.notes["lora_tensors"] == 28
    assert find_last_checkpoint(run.checkpoint_dir("dpo", recipe)) is not None
