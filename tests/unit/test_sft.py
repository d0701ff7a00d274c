"""Supervised fine-tuning and the training loop: what is scored, what is kept, and resuming as if
nothing had happened."""

import math

import pytest
import torch
from tiny_dpo import Interrupted, same_weights, stop_at, weights
from tiny_model import copy_sft_run, make_frame, make_recipe, shared_base, start_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from hallulib.checkpoints import Log
from hallulib.errors import DataError, GateFailed
from hallulib.files import read_jsonl
from hallulib.sft import make_task, tokenise_rows, train_sft
from hallulib.training import InForward, draw_order, evaluate, report_slow_step

pytestmark = pytest.mark.unit


def start(tmp_path, overrides, name="run", **data):
    """A recipe, and a run in which the data is finished."""
    recipe = make_recipe(overrides)
    return recipe, start_run(tmp_path / name, recipe, **data)


def read_log(run) -> list[dict]:
    return read_jsonl(run.path("sft/metrics.jsonl"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shared_base())


def test_rows_that_do_not_fit_are_left_out_and_counted_never_cut(tokenizer, tmp_path):
    frame = make_frame(3, "train")
    frame.loc[1, "prompt"] = "long " * 200
    frame.loc[2, "reference"] = "  "
    rows, dropped = tokenise_rows(frame, tokenizer, max_length=160)
    assert len(rows) == 1
    assert dropped == {"longer than model.max_length": 1, "empty reference": 1}
    with pytest.raises(DataError, match=r"None of 3 rows[\s\S]*Raise model.max_length \(now 10\)"):
        tokenise_rows(frame, tokenizer, max_length=10)
    with pytest.raises(DataError, match="None of 24 rows"):  # before a model is loaded
        train_sft(*start(tmp_path, {"model.max_length": 8}))


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


def test_training_writes_the_adapter_and_metrics_lowers_the_loss_and_is_not_done_again(
    tmp_path, capsys
):
    recipe = make_recipe()
    run = copy_sft_run(tmp_path / "run", recipe)
    notes = train_sft(recipe, run).notes
    assert "sft: unchanged, reusing" in capsys.readouterr().out
    rows = read_jsonl(run.require("sft/metrics.jsonl"))
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert 0 < evaluated[-1]["eval_token_accuracy"] <= 1
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert {"loss", "grad_norm", "learning_rate", "token_accuracy"} <= set(rows[1])
    best = min(evaluated, key=lambda row: row["eval_loss"])
    assert notes["metrics"]["eval_loss"] == best["eval_loss"]
    assert notes["best_step"] == best["step"]
    assert notes["trainable_parameters"] > 0


def test_an_interrupted_run_resumes_to_exactly_the_same_weights(tmp_path, monkeypatch, capsys):
    # Dropout on, so that the random state has to be restored too. Steps 4 and 5 are logged and
    # not saved: they are done, and logged, a second time.
    steps = {"sft.max_steps": 7, "sft.eval_steps": 3, "sft.save_steps": 3}
    settings = {"lora.dropout": 0.1, "sft.gradient_accumulation": 2} | steps
    recipe, straight = start(tmp_path, settings, "straight")
    train_sft(recipe, straight)
    recipe, broken = start(tmp_path, settings, "broken")
    with monkeypatch.context() as patch:
        stop_at(patch, step=6)
        with pytest.raises(Interrupted):
            train_sft(recipe, broken)
    assert "sft" not in broken.manifest["stages"]
    assert not broken.path("sft/adapter").exists()
    train_sft(recipe, broken)
    assert "resuming from" in capsys.readouterr().out
    assert same_weights(weights(straight, "sft/adapter"), weights(broken, "sft/adapter"))
    assert read_log(straight) == read_log(broken)


def test_the_best_and_the_last_checkpoint_are_kept_without_the_base_model(tmp_path, monkeypatch):
    # Saved every 8 steps, evaluated every 2: the best must be saved although it is not due.
    settings = {"sft.max_steps": 8, "sft.save_steps": 8, "sft.warmup_steps": 0}
    recipe, run = start(tmp_path, settings)
    original = Log.write

    def write(self, at, values):  # from step 5 on a higher validation loss than was measured
        worse = 10.0 if at >= 5 else 0.0
        changed = {k: v + worse for k, v in values.items() if k == "eval_loss"}
        return original(self, at, values | changed)

    monkeypatch.setattr(Log, "write", write)
    result = train_sft(recipe, run)
    assert result.notes["best_step"] == 4
    folders = sorted(run.checkpoint_dir("sft", recipe).glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-4", "checkpoint-8"]
    saved, best, last = (weights(run, path) for path in (result.path, *folders))
    assert same_weights(saved, best) and not same_weights(saved, last)
    assert sorted(path.name for path in folders[0].iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "optimizer.bin",
        "random_states_0.pkl", "scheduler.bin", "state.json",
    ]  # fmt: skip
    assert not any("embed" in name for name in best)


def test_a_checkpoint_that_was_cut_off_while_written_does_not_count(tmp_path, monkeypatch, capsys):
    recipe, run = start(tmp_path, {})
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
        recipe, run = start(tmp_path, settings, f"run{parts}", train=8)
        train_sft(recipe, run)
        rows = [row for row in read_log(run) if "grad_norm" in row]
        found.append(([row["loss"] for row in rows], [row["grad_norm"] for row in rows]))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_every_row_comes_once_before_any_again_in_batches_of_like_length_in_random_order():
    lengths = [number % 7 for number in range(40)]
    order = draw_order(lengths, batch_size=4, batches=20, seed=3)
    assert len(order) == 80
    assert sorted(order[:40]) == list(range(40)) == sorted(order[40:])
    assert order == draw_order(lengths, batch_size=4, batches=20, seed=3)
    assert order != draw_order(lengths, batch_size=4, batches=20, seed=4)
    order = draw_order(list(range(64)), batch_size=4, batches=16, seed=0)
    batches = [order[i : i + 4] for i in range(0, 64, 4)]
    assert all(max(batch) - min(batch) == 3 for batch in batches)
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize(
    ("rate", "steps", "what"), [(1e30, 4, "loss of step 2 is nan"), (1e39, 1, "no numbers")]
)
def test_a_rate_that_breaks_the_model_is_an_error_and_not_a_result(tmp_path, rate, steps, what):
    settings = {"learning_rate": rate, "warmup_steps": 0, "max_steps": steps}
    recipe, run = start(tmp_path, {"sft": settings})
    with pytest.raises(GateFailed, match=what):
        train_sft(recipe, run)
    assert "sft" not in run.manifest["stages"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_training_stops_at_the_first_loss_that_is_no_number(tmp_path, monkeypatch, value):
    original, calls = torch.Tensor.backward, []

    def backward(self, *arguments, **named):
        calls.append(self)
        if len(calls) == 3:  # the probe was the first; the gradients of step 2 break
            self = self * value
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with pytest.raises(GateFailed, match="loss of step 3 is nan"):
        train_sft(*start(tmp_path, {"sft.save_steps": 4, "sft.eval_steps": 4}))


def test_a_step_that_takes_many_times_the_usual_is_reported_once(capsys):
    pace = []
    for step, seconds in enumerate([1, 1, 1, 1, 200, 1], start=1):
        report_slow_step(step, seconds, pace)
    assert pace == [1, 1, 1, 1, 1]
    assert capsys.readouterr().out.count("step 5 took 200 s, the usual is 1.0 s: did the") == 1


def test_tensorboard_gets_the_curves_when_the_recipe_asks_for_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, run = start(tmp_path, {"sft.report_to": "tensorboard", "sft.max_steps": 2})
    train_sft(recipe, run)
    events = EventAccumulator(str(run.path("tensorboard/sft")))
    events.Reload()
    assert {"train/loss", "train/token_accuracy", "eval/loss"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_the_longest_rows_run_before_anything_is_trained(tmp_path, monkeypatch):
    seen, original = [], torch.nn.Embedding.forward

    def forward(self, ids):
        seen.append(tuple(ids.shape))
        return original(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    train_sft(*start(tmp_path, {}))
    assert seen[0] == (4, max(width for _, width in seen))
