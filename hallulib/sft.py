"""Supervised fine-tuning with LoRA: the loss counts the summary's tokens only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from hallulib.adapters import attach_adapter, check_gradient_flow, lora_parameters, save_adapter
from hallulib.errors import DataError
from hallulib.files import write_text_atomic
from hallulib.metrics_log import METRICS_FILE, MetricsLog
from hallulib.models import load_base_model, load_tokenizer
from hallulib.processes import is_main_process
from hallulib.recipe import Recipe
from hallulib.run import Run
from hallulib.scoring import encode_completion, pad_rows, score_completions
from hallulib.stage import stage
from hallulib.training import MeanTrainer, build_arguments, find_best_checkpoint, train_to_end
from hallulib.watch import explain_out_of_memory


@dataclass(frozen=True)
class SftResult:
    """What SFT made. `metrics` are those of the saved step: eval_loss, eval_token_accuracy."""

    adapter: Path
    metrics: dict[str, float]
    best_step: int
    notes: dict[str, Any] = field(default_factory=dict)


def load_sft_result(run: Run) -> SftResult:
    """Read the result of a finished SFT back from the run."""
    notes = run.manifest["stages"]["sft"]["notes"]
    return SftResult(run.path("sft/adapter"), notes["metrics"], notes["best_step"], notes)


@stage("sft", load=load_sft_result, parallel=True)
def train_sft(recipe: Recipe, run: Run) -> SftResult:
    """Fine-tune a LoRA adapter on the reference summaries and save the best step by eval loss.

    Writes sft/adapter and sft/metrics.jsonl; keeps the best and the last checkpoint, and resumes
    from the last exactly. Raises DataError when no row fits model.max_length.
    """
    tokenizer = load_tokenizer(recipe)
    rows, dropped = _load_rows(run, "train", tokenizer, recipe.model.max_length)
    validation, dropped_too = _load_rows(run, "validation", tokenizer, recipe.model.max_length)
    folder = run.checkpoint_dir("sft", recipe)
    model = attach_adapter(load_base_model(recipe), recipe)
    # Up over the warm-up, then down to zero in a straight line.
    args = build_arguments(recipe, recipe.sft, folder, schedule="linear")
    trainer = SftTrainer(model, recipe, args, rows, validation, tokenizer.pad_token_id)
    tensorboard = run.path("tensorboard/sft") if recipe.sft.report_to == "tensorboard" else None
    log = MetricsLog(folder, tensorboard, "sft")
    trainer.add_callback(log)
    trainer.probe(rows)
    train_to_end(trainer)
    dropped_rows = {"train": dropped, "validation": dropped_too}
    return _save_best(run, recipe, trainer, log, dropped_rows)


def _save_best(
    run: Run, recipe: Recipe, trainer: SftTrainer, log: MetricsLog, dropped: dict
) -> SftResult:
    folder = Path(trainer.args.output_dir)
    best = find_best_checkpoint(folder)
    trainer.policy.load_adapter(str(best), "default", is_trainable=True)
    if is_main_process():
        save_adapter(trainer.policy, run.path("sft/adapter"), recipe)
        text = (folder / METRICS_FILE).read_text("utf-8")
        write_text_atomic(run.path("sft/metrics.jsonl"), text)
    step = int(best.name.rpartition("-")[2])
    metrics = log.values_at(step, "eval_")
    trainable = sum(p.numel() for p in lora_parameters(trainer.policy).values())
    notes = {
        "metrics": metrics, "best_step": step, "steps": trainer.state.global_step,
        "dropped": dropped, "trainable_parameters": trainable,
    }  # fmt: skip
    return SftResult(run.path("sft/adapter"), metrics, step, notes)


def tokenise_rows(
    frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    """Return rows {prompt_ids, completion_ids} and how many rows were left out, by reason.

    A row that does not fit is left out, not cut: a note cut off in the middle would teach the
    model to state what it has not read. Raises DataError when nothing is left.
    """
    rows, dropped = [], Counter()
    for prompt, reference in zip(frame["prompt"], frame["reference"], strict=True):
        if not reference or not reference.strip():
            dropped["empty reference"] += 1
            continue
        prompt_ids, completion_ids = encode_completion(tokenizer, prompt, reference)
        if len(prompt_ids) + len(completion_ids) > max_length:
            dropped["longer than model.max_length"] += 1
            continue
        rows.append({"prompt_ids": prompt_ids, "completion_ids": completion_ids})
    if not rows:
        raise DataError(
            f"None of {len(frame)} rows can be trained on: {dict(dropped)}.",
            f"Raise model.max_length (now {max_length}) or shorten the notes.",
        )
    return rows, dict(dropped)


def _load_rows(
    run: Run, split: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], dict[str, int]]:
    frame = pd.read_parquet(run.require(f"data/{split}.parquet"), columns=["prompt", "reference"])
    rows, dropped = tokenise_rows(frame, tokenizer, max_length)
    for reason, count in dropped.items():
        print(f"sft: {count} of {len(frame)} {split} rows left out, {reason}")
    return rows, dropped


def measure_tokens(
    logps: torch.Tensor, hits: torch.Tensor, token_weight: float = 1.0
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, int]]]:
    """Return the SFT loss, a scalar, and its metrics as name -> (sum, how many), from the log-prob
    (nats) of every completion token and whether it was the most likely one."""
    loss, nll = -logps.mean() * token_weight, -logps.detach().sum()
    return loss, {"loss": (nll, len(logps)), "token_accuracy": (hits.sum(), len(hits))}


class SftTrainer(MeanTrainer):
    """Mean negative log-likelihood of completion tokens, and how often the top token is right."""

    def __init__(self, model, recipe, args, rows, validation, pad_id: int) -> None:
        self.pad_id = pad_id
        super().__init__(
            model, recipe, args, rows, validation, self.collate,
            length=lambda row: len(row["prompt_ids"]) + len(row["completion_ids"]),
        )  # fmt: skip

    def collate(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return input_ids and completion_mask, (rows, tokens), padded on the right."""
        pairs = [(row["prompt_ids"], row["completion_ids"]) for row in rows]
        input_ids, mask = pad_rows(pairs, self.pad_id)
        return {"input_ids": input_ids, "completion_mask": mask}

    def measure(self, model, batch):
        rows = (batch["input_ids"], batch["completion_mask"])
        logps, hits = model(score_completions, *rows)
        return measure_tokens(logps, hits, self.weigh_tokens(len(logps)))

    def total_loss(self, means: dict[str, float]) -> float:
        return means["loss"]

    def probe(self, rows: list[dict[str, list[int]]]) -> None:
        """Run the longest batch once, forward and backward, before anything is trained.

        Running out of memory shows here and not hours later, and so does an adapter that no
        gradient reaches (GateFailed).
        """
        longest = sorted(rows, key=lambda row: -len(row["prompt_ids"] + row["completion_ids"]))
        batch = self.collate(longest[: self.args.per_device_train_batch_size])
        tokens = batch["input_ids"].shape[1]
        self.model.train()
        with explain_out_of_memory("sft", tokens):
            loss, _ = self.measure(self.model, self._prepare_inputs(batch))
            loss.backward()
        check_gradient_flow(self.policy)
        self.model.zero_grad(set_to_none=True)
