"""Supervised fine-tuning: what is scored, what is kept, and resuming as if nothing had happened."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from tiny_dpo import Interrupted, same_weights, stop_at, weights
from tiny_model import copy_sft_run, make_frame, make_recipe, shared_base, start_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from hallulib.checkpoints import Log, load_trained
from hallulib.errors import DataError, GateFailed
from hallulib.files import read_jsonl
from hallulib.sft import make_task, tokenise_rows, train_sft
from hallulib.training import InForward, draw_order, evaluate

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shared_base())


def test_rows_that_do_not_fit_are_left_out_and_counted_never_cut(tokenizer):
    frame = make_frame(3, "train")
    frame.loc[1, "prompt"] = "long " * 200
    frame.loc[2, "reference"] = "  "
    rows, dropped = tokenise_rows(frame, tokenizer, max_length=160)
    assert len(rows) == 1
    assert dropped == {"longer than model.max_length": 1, "empty reference": 1}
    with pytest.raises(DataError, match=r"None of 3 rows[\s\S]*Raise model.max_length \(now 10\)"):
        tokenise_rows(frame, tokenizer, max_length=10)


def test_the_loss_and_accuracy_count_completion_tokens_only(tokenizer):
    rows, _ = tokenise_rows(make_frame(5, "train"), tokenizer, max_length=160)
    model = AutoModelForCausalLM.from_pretrained(shared_base())
    task = make_task(rows, rows, tokenizer.pad_token_id)
    loss, sums = task.measure(InForward(model), task.collate(rows, True), 1.0)
    nll, hits, count = 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logps = model(ids).logits[0].log_softmax(-1)
        for place in range(len(row.prompt_ids), ids.shape[1]):
            nll -= logps[place - 1, ids[0, place]].item()
            hits += int(logps[place - 1].argmax() == ids[0, place])
            count += 1
    assert loss.item() == pytest.approx(nll / count, abs=1e-5)
    assert (int(sums["token_accuracy"][0]), sums["token_accuracy"][1]) == (hits, count)
    # The mean over all rows does not depend on how they fall into batches.
    assert evaluate(model, task, 2)["eval_loss"] == pytest.approx(nll / count, abs=1e-5)


def test_training_writes_the_adapter_and_metrics_and_lowers_the_loss(tmp_path):
    recipe = make_recipe()
    run = copy_sft_run(tmp_path / "run", recipe)
    result = load_trained(run, "sft")
    rows = read_jsonl(run.require("sft/metrics.jsonl"))
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert 0 < evaluated[-1]["eval_token_accuracy"] <= 1
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "learning_rate", "token_accuracy"} <= set(rows[1])
    best = min(evaluated, key=lambda row: row["eval_loss"])
    assert result.metrics["eval_loss"] == best["eval_loss"]
    assert result.notes["best_step"] == best["step"]
    assert result.notes["trainable_parameters"] > 0


def test_an_unchanged_sft_is_not_trained_again(tmp_path, capsys):
    recipe = make_recipe()
    run = copy_sft_run(tmp_path / "run", recipe)
    train_sft(recipe, run)
    assert "sft: unchanged, reusing" in capsys.readouterr().out


def test_an_interrupted_run_resumes_to_exactly_the_same_weights(tmp_path, monkeypatch, capsys):
    # Dropout on, so that the random state has to be restored too. Steps 4 and 5 are logged and
    # not saved: they are done, and logged, a second time.
    steps = {"sft.max_steps": 7, "sft.eval_steps": 3, "sft.save_steps": 3}
    recipe = make_recipe({"lora.dropout": 0.1, "sft.gradient_accumulation": 2} | steps)
    straight = start_run(tmp_path / "straight", recipe)
    train_sft(recipe, straight)
    broken = start_run(tmp_path / "broken", recipe)
    with monkeypatch.context() as patch:
        stop_at(patch, step=6)
        with pytest.raises(Interrupted):
            train_sft(recipe, broken)
    assert "sft" not in broken.manifest["stages"]
    assert not broken.path("sft/adapter").exists()
    train_sft(recipe, broken)
    assert "resuming from" in capsys.readouterr().out
    assert same_weights(weights(straight, "sft/adapter"), weights(broken, "sft/adapter"))
    logs = [read_jsonl(run.path("sft/metrics.jsonl")) for run in (straight, broken)]
    assert logs[0] == logs[1]


def make_worse_from(monkeypatch, step: int) -> None:
    """From this step on the log gets a higher validation loss than was measured."""
    original = Log.write

    def write(self, at, values):
        if at >= step and "eval_loss" in values:
            values = values | {"eval_loss": values["eval_loss"] + 10.0}
        return original(self, at, values)

    monkeypatch.setattr(Log, "write", write)


def test_the_best_and_the_last_checkpoint_are_kept(tmp_path, monkeypatch):
    # Saved every 8 steps, evaluated every 2: the best must be saved although it is not due.
    recipe = make_recipe({"sft.max_steps": 8, "sft.save_steps": 8, "sft.warmup_steps": 0})
    run = start_run(tmp_path / "run", recipe)
    make_worse_from(monkeypatch, 5)
    result = train_sft(recipe, run)
    assert result.notes["best_step"] == 4
    folder = run.checkpoint_dir("sft", recipe)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    saved, best, last = (
        weights(run, path) for path in (result.adapter, *sorted(folder.glob("checkpoint-*")))
    )
    assert same_weights(saved, best) and not same_weights(saved, last)


def test_a_checkpoint_holds_adapter_optimiser_and_random_states_and_not_the_base_model(tmp_path):
    recipe = make_recipe({"sft.max_steps": 2})
    run = start_run(tmp_path / "run", recipe)
    train_sft(recipe, run)
    folder = run.checkpoint_dir("sft", recipe) / "checkpoint-2"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "optimizer.bin",
        "random_states_0.pkl", "scheduler.bin", "state.json",
    ]  # fmt: skip
    assert not any("embed" in name for name in weights(run, folder))


def test_a_checkpoint_that_was_cut_off_while_written_does_not_count(tmp_path, monkeypatch, capsys):
    recipe = make_recipe()
    run = start_run(tmp_path / "run", recipe)
    with monkeypatch.context() as patch:
        stop_at(patch, step=4)
        with pytest.raises(Interrupted):
            train_sft(recipe, run)
    folder = run.checkpoint_dir("sft", recipe)
    (folder / "checkpoint-2").rename(folder / "checkpoint-3")
    (folder / "checkpoint-3/state.json").unlink()  # the file that is written last
    train_sft(recipe, run)
    assert "resuming" not in capsys.readouterr().out


def test_micro_batches_train_as_one_large_batch_does(tmp_path):
    # A step is all eight rows. They are of unequal length, so a mean of means would weigh their
    # tokens unequally.
    found = []
    for parts in (1, 4):
        settings = {"sft.batch_size": 8 // parts, "sft.gradient_accumulation": parts}
        recipe = make_recipe(settings)
        run = start_run(tmp_path / f"run{parts}", recipe, train=8)
        train_sft(recipe, run)
        rows = [r for r in read_jsonl(run.path("sft/metrics.jsonl")) if "grad_norm" in r]
        found.append(([row["loss"] for row in rows], [row["grad_norm"] for row in rows]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_every_row_comes_once_before_any_comes_again():
    lengths = [number % 7 for number in range(40)]
    order = draw_order(lengths, batch_size=4, batches=20, seed=3)
    assert len(order) == 80
    assert sorted(order[:40]) == list(range(40)) == sorted(order[40:])
    assert order == draw_order(lengths, batch_size=4, batches=20, seed=3)
    assert order != draw_order(lengths, batch_size=4, batches=20, seed=4)


def test_batches_hold_rows_of_like_length_in_random_order():
    lengths = list(range(64))
    order = draw_order(lengths, batch_size=4, batches=16, seed=0)
    batches = [order[i : i + 4] for i in range(0, 64, 4)]
    assert all(max(batch) - min(batch) == 3 for batch in batches)
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize(
    ("rate", "steps", "what"), [(1e30, 4, "loss of step 2 is nan"), (1e39, 1, "no numbers")]
)
def test_a_rate_that_breaks_the_model_is_an_error_and_not_a_result(tmp_path, rate, steps, what):
    settings = {"learning_rate": rate, "warmup_steps": 0, "max_steps": steps}
    recipe = make_recipe({"sft": settings})
    run = start_run(tmp_path / "run", recipe)
    with pytest.raises(GateFailed, match=what):
        train_sft(recipe, run)
    assert "sft" not in run.manifest["stages"]


def test_tensorboard_gets_the_curves_when_the_recipe_asks_for_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe({"sft.report_to": "tensorboard", "sft.max_steps": 2})
    run = start_run(tmp_path / "run", recipe)
    train_sft(recipe, run)
    events = EventAccumulator(str(run.path("tensorboard/sft")))
    events.Reload()
    assert {"train/loss", "train/token_accuracy", "eval/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_the_longest_rows_run_before_anything_is_trained(tmp_path, monkeypatch):
    recipe = make_recipe()
    run = start_run(tmp_path / "run", recipe)
    seen, original = [], torch.nn.Embedding.forward

    def forward(self, ids):
        seen.append((self.weight.requires_grad, ids.shape))
        return original(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    train_sft(recipe, run)
    widths = [shape[1] for _, shape in seen]
    assert seen[0][1][0] == 4 and widths[0] == max(widths)


def test_a_frame_without_a_fitting_row_stops_the_stage_before_a_model_is_loaded(tmp_path):
    recipe = make_recipe({"model.max_length": 8})
    run = start_run(tmp_path / "run", recipe)
    with pytest.raises(DataError, match="None of 24 rows"):
        train_sft(recipe, run)
    assert isinstance(pd.read_parquet(run.path("data/train.parquet")), pd.DataFrame)
