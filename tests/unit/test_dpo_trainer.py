"""Sequential DPO: it starts at ln 2, trains the adapter only, resumes exactly; every gate fires."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_dpo import Interrupted, reference_run, same_weights, stop_at, weights
from tiny_model import make_recipe, record_pairs, start_run, write_base_model

from hallulib.checkpoints import Log
from hallulib.dpo import gates
from hallulib.dpo import train as dpo_train
from hallulib.dpo.batching import TokenPair, collate_pairs
from hallulib.dpo.losses import dpo_loss, ipo_loss, simpo_loss
from hallulib.dpo.reference import ReferenceCache, cache_reference
from hallulib.dpo.train import load_start, make_task, measure_pairs, train_dpo
from hallulib.dpo.train import train_comparison_arms as train_arms
from hallulib.errors import GateFailed
from hallulib.files import read_jsonl, sha256_tree
from hallulib.models import attach_adapter, load_base_model, load_policy
from hallulib.recipe_sections import DpoSection
from hallulib.run import load_result
from hallulib.sft import train_sft
from hallulib.training import InForward, probe_longest_batch, share_out

pytestmark = pytest.mark.unit

LN_2 = pytest.approx(math.log(2), abs=1e-5)


def test_training_starts_at_ln_2_raises_the_margin_and_changes_the_adapter_only(tmp_path):
    recipe, run = reference_run(tmp_path / "run", {"dpo.learning_rate": 5e-3})
    base = sha256_tree(recipe.model.name_or_path)
    result = train_dpo(recipe, run)
    rows = read_jsonl(run.require("dpo/metrics.jsonl"))
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 3, 6]
    assert evaluated[0]["eval_dpo_loss"] == LN_2 and result.notes["start_loss"] == LN_2
    assert evaluated[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert evaluated[-1]["eval_rewards/margins"] > 0.05
    assert evaluated[-1]["eval_rewards/accuracies"] == 1.0
    step = next(row for row in rows if row["step"] == 2 and "loss" in row)
    names = ("chosen", "rejected", "accuracies", "margins")
    assert {f"rewards/{name}" for name in names} <= set(step)
    assert {"logps/chosen", "logps/rejected", "grad_norm", "learning_rate"} <= set(step)
    assert step["loss"] == pytest.approx(step["dpo_loss"] + step["sft_loss"], abs=1e-5)
    assert load_result(run, "dpo") == result
    # One adapter of the same size, in which everything has moved, on the same base model.
    before, after = weights(run, "sft/adapter"), weights(run)
    assert before.keys() == after.keys() and len(after) == result.notes["lora_tensors"] == 28
    assert all(before[name].shape == after[name].shape for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert sha256_tree(recipe.model.name_or_path) == base


def test_the_saved_adapter_is_the_last_step_and_the_best_stays_in_checkpoints(
    tmp_path, monkeypatch
):
    recipe, run = reference_run(tmp_path / "run")
    original = Log.write

    def write(self, at, values):  # the validation loss only rises
        rising = {"eval_loss": float(at)} if "eval_loss" in values else {}
        return original(self, at, values | rising)

    monkeypatch.setattr(Log, "write", write)
    assert train_dpo(recipe, run).notes["best_step"] == 3
    folder = run.checkpoint_dir("dpo", recipe)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert same_weights(weights(run), weights(run, folder / "checkpoint-6"))


def test_an_interrupted_run_resumes_to_the_same_bits_and_never_against_another_reference(
    tmp_path, monkeypatch, capsys
):
    recipe, straight = reference_run(tmp_path / "straight")
    train_dpo(recipe, straight)
    recipe, broken = reference_run(tmp_path / "broken")
    with monkeypatch.context() as patch:
        stop_at(patch, step=5)
        with pytest.raises(Interrupted):
            train_dpo(recipe, broken)
    assert "dpo" not in broken.manifest["stages"]
    file = broken.checkpoint_dir("dpo", recipe) / "checkpoint-4/state.json"
    text = file.read_text()
    assert len(json.loads(text)["reference"]) == 64
    for other, name in (("0" * 64, "000000000000"), ("", "none")):
        file.write_text(json.dumps(json.loads(text) | {"reference": other}))
        with pytest.raises(GateFailed, match=f"trained against reference {name}"):
            train_dpo(recipe, broken)
    file.write_text(text)
    train_dpo(recipe, broken)
    assert "checkpoint-4" in capsys.readouterr().out
    assert same_weights(weights(straight), weights(broken))
    logs = [read_jsonl(run.path("dpo/metrics.jsonl")) for run in (straight, broken)]
    assert logs[0] == logs[1]


# --- the gates ---


def test_a_wrong_reference_is_caught_before_the_first_step(tmp_path, monkeypatch):
    recipe, run = reference_run(tmp_path / "run")
    assert load_start(recipe, run).notes["start_loss"] == LN_2
    original = ReferenceCache.add_reference

    def add_reference(self, pairs):
        self.rows = {at: (chosen + 0.05, rejected) for at, (chosen, rejected) in self.rows.items()}
        return original(self, pairs)

    monkeypatch.setattr(ReferenceCache, "add_reference", add_reference)
    monkeypatch.setattr(ReferenceCache, "spot_check", lambda *_: 0.0)
    with pytest.raises(GateFailed, match=r"not ln 2 = 0.6931"):
        train_dpo(recipe, run)


def test_the_base_model_as_reference_is_caught(tmp_path, monkeypatch):
    # The cache is the SFT policy's; a policy with a fresh adapter is the base model.
    recipe, run = reference_run(tmp_path / "run")

    def load_fresh(recipe, path, trainable):
        return attach_adapter(load_base_model(recipe), recipe)

    monkeypatch.setattr(dpo_train, "load_policy", load_fresh)
    with pytest.raises(GateFailed, match="LoRA tensor .* is not the SFT adapter's"):
        train_dpo(recipe, run)
    monkeypatch.setattr(gates, "check_adapter_file", lambda *_: 0)
    with pytest.raises(GateFailed, match="made with another adapter_weights"):
        train_dpo(recipe, run)


def test_a_frozen_adapter_and_a_trainable_base_weight_are_caught(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    start = load_start(recipe, run)
    task = make_task(start, "dpo", recipe.dpo)
    name, parameter = next((n, p) for n, p in start.policy.named_parameters() if "lora_A" in n)
    parameter.requires_grad_(False)
    with pytest.raises(GateFailed, match="is frozen"):
        probe_longest_batch(start.policy, task, 4)
    parameter.requires_grad_(True)
    start.policy.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(GateFailed, match="norm.weight would be trained"):
        probe_longest_batch(start.policy, task, 4)


def test_a_second_adapter_and_a_lora_layer_within_a_lora_layer_are_caught(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=True)
    gates.check_single_adapter(policy)
    with pytest.raises(GateFailed, match="within the LoRA layer"):
        gates.check_single_adapter(get_peft_model(policy, LoraConfig(target_modules=["q_proj"])))
    policy = load_policy(recipe, run.require("sft/adapter"), trainable=True)
    policy.load_adapter(str(run.require("sft/adapter")), "again")
    with pytest.raises(GateFailed, match="default.*again"):
        gates.check_single_adapter(policy)
    with pytest.raises(GateFailed):
        gates.check_single_adapter(load_base_model(recipe))


def test_empty_and_identical_completions_are_caught():
    good = TokenPair([1, 2], [3, 9], [4, 9])
    gates.check_pairs([good])
    for bad in (TokenPair([1, 2], [9], [4, 9]), TokenPair([1, 2], [3, 9], [9])):
        with pytest.raises(GateFailed, match="Pair 1 has an empty prompt or side"):
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


# --- what is trained ---


def test_dropout_is_off_in_training(tmp_path, monkeypatch):
    recipe, run = reference_run(tmp_path / "run")

    def load_with_dropout(*arguments, **named):
        policy = load_policy(*arguments, **named)
        for module in policy.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.5)
        return policy

    monkeypatch.setattr(dpo_train, "load_policy", load_with_dropout)
    start = load_start(recipe, run)
    task, model = make_task(start, "dpo", recipe.dpo), InForward(start.policy).train()
    batch = task.collate(start.pairs, True)
    assert torch.equal(*(task.measure(model, batch, 1.0)[0] for _ in range(2)))
    assert start.notes["start_loss"] == LN_2


def test_arms_see_the_same_pairs_in_the_same_order_and_differ_in_the_loss(tmp_path):
    recipe, run = reference_run(tmp_path / "run")
    start = load_start(recipe, run)
    names = ("dpo", "dpo_plain", "sft_on_chosen")
    tasks = [make_task(start, name, recipe.dpo) for name in names]
    orders = [share_out(task.rows, recipe.dpo, seed=0) for task in tasks]
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 6
    model, pairs = InForward(start.policy), start.pairs[:4]
    both, plain, chosen = (t.measure(model, t.collate(pairs, True), 1.0)[0].item() for t in tasks)
    assert plain == LN_2
    assert both == pytest.approx(plain + chosen, abs=1e-5)
    # The control runs one side in training, and is evaluated on both all the same.
    control = tasks[2]
    training, validation = (control.collate(pairs, training) for training in (True, False))
    assert len(training["counts"]) == 4 and len(validation["counts"]) == 8
    assert "rewards/margins" in control.measure(model, validation, 1.0)[1]


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo"])
def test_the_loss_of_the_recipe_is_the_one_that_is_trained(name):
    chosen, rejected = torch.tensor([-3.0, -5.0]), torch.tensor([-6.0, -2.0])
    counts = torch.tensor([2, 3, 4, 2])
    batch = {"counts": counts, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    references, tokens = (chosen, rejected), counts.chunk(2)
    logps = [-torch.rand(count) for count in counts.tolist()]
    section = DpoSection(loss=name, beta=0.3, simpo_gamma=0.7)
    found, metrics = measure_pairs(logps, batch, section, True, 0.0)
    chosen, rejected = torch.stack([values.sum() for values in logps]).chunk(2)
    ratios = (chosen - references[0]) / tokens[0], (rejected - references[1]) / tokens[1]
    expected = {
        "sigmoid": dpo_loss(chosen, rejected, *references, 0.3)[0],
        "ipo": ipo_loss(*ratios, 0.3),
        "simpo": simpo_loss(chosen / tokens[0], rejected / tokens[1], 0.3, 0.7),
    }[name]
    assert found.item() == pytest.approx(expected.mean().item())
    assert metrics["dpo_loss"][0].item() == pytest.approx(expected.sum().item())


def test_micro_batches_train_as_one_large_batch_does(tmp_path):
    # A step is all ten pairs; their chosen completions are of unequal length.
    found = []
    for parts in (1, 5):
        settings = {"dpo.batch_size": 10 // parts, "dpo.gradient_accumulation": parts}
        recipe, run = reference_run(tmp_path / f"run{parts}", settings | {"dpo.guardrail_notes": 0})
        train_dpo(recipe, run)
        rows = [r for r in read_jsonl(run.path("dpo/metrics.jsonl")) if "grad_norm" in r]
        found.append(([row["loss"] for row in rows], [row["grad_norm"] for row in rows]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


def test_a_finished_arm_is_not_trained_twice_and_each_is_the_one_trained_alone(
    tmp_path, monkeypatch, capsys
):
    settings = {"dpo.max_steps": 2, "dpo.guardrail_notes": 0}
    recipe, run = reference_run(tmp_path / "run", settings)
    run.path("dpo/arms/old").mkdir(parents=True)
    with monkeypatch.context() as patch:
        stop_at(patch, step=2, folder="sft_on_chosen")
        with pytest.raises(Interrupted):
            train_arms(recipe, run)
    plain = weights(run, "dpo/arms/dpo_plain/adapter")
    result = train_arms(recipe, run)
    assert "dpo_plain/checkpoint-2" in capsys.readouterr().out  # it was at its end
    losses = {arm: notes["metrics"]["eval_loss"] for arm, notes in result.notes["arms"].items()}
    assert list(losses) == ["dpo_plain", "sft_on_chosen"]
    assert sorted(p.name for p in run.require("dpo/arms").iterdir()) == sorted(losses)
    assert same_weights(plain, weights(run, "dpo/arms/dpo_plain/adapter"))
    assert losses["dpo_plain"] != losses["sft_on_chosen"]
    assert train_arms(recipe, run) == result
    # The policy is loaded once, and starts at the SFT adapter for each arm.
    control = weights(run, "dpo/arms/sft_on_chosen/adapter")
    assert not same_weights(plain, control)
    settings["dpo.comparison_arms"] = ["sft_on_chosen"]
    recipe, alone = reference_run(tmp_path / "alone", settings)
    train_arms(recipe, alone)
    assert same_weights(control, weights(alone, "dpo/arms/sft_on_chosen/adapter"))


def test_no_comparison_arms_is_an_empty_folder(tmp_path):
    recipe, run = reference_run(tmp_path / "run", {"dpo.comparison_arms": []})
    assert train_arms(recipe, run).notes == {"arms": {}}
    assert list(run.require("dpo/arms").iterdir()) == []


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
    notes = train_dpo(recipe, run).notes
    assert notes["start_loss"] == pytest.approx(math.log(2), abs=0.01)
    assert notes["lora_tensors"] == 28
    assert len(list(run.checkpoint_dir("dpo", recipe).glob("checkpoint-1/state.json"))) == 1
