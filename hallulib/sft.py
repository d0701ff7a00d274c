"""Supervised fine-tuning with LoRA: the loss counts the summary's tokens only."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedTokenizerBase

from hallulib.checkpoints import Log, write_trained
from hallulib.errors import DataError
from hallulib.meter import explain_out_of_memory
from hallulib.models import attach_adapter, load_base_model, load_tokenizer, lora_parameters
from hallulib.recipe import Recipe
from hallulib.run import Result, Run, stage
from hallulib.scoring import encode_completion, pad_rows, score_completions
from hallulib.training import Batch, Metrics, Task, train


class TokenRow(NamedTuple):
    """Token ids of a prompt and of the completion that is learnt, which ends in one EOS."""

    prompt_ids: list[int]
    completion_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@stage("sft", parallel=True)
def train_sft(recipe: Recipe, run: Run) -> Result:
    """Fine-tune a LoRA adapter on the reference summaries and save the best step by eval loss.

    Writes sft/adapter and sft/metrics.jsonl; keeps the best and the last checkpoint, and resumes
    from the last exactly. Raises DataError when no row fits model.max_length.
    """
    tokenizer = load_tokenizer(recipe)
    rows, dropped = {}, {}
    for split in ("train", "validation"):
        frame = pd.read_parquet(run.require(f"data/{split}.parquet"))
        rows[split], dropped[split] = tokenise_rows(frame, tokenizer, recipe.model.max_length)
        for reason, count in dropped[split].items():
            print(f"sft: {count} of {len(frame)} {split} rows left out, {reason}")
    policy = attach_adapter(load_base_model(recipe), recipe)
    task = make_task(rows["train"], rows["validation"], tokenizer.pad_token_id)
    board = run.path("tensorboard/sft") if recipe.sft.report_to == "tensorboard" else None
    log = Log(run.checkpoint_dir("sft", recipe), board)
    longest = max(row.length for row in rows["train"])
    with explain_out_of_memory("sft", longest, run.path("budget/sft.json")):
        train(policy, task, recipe.sft, log, recipe.seed)
    best = log.find_best_step()
    policy.load_adapter(str(log.name_checkpoint(best)), "default")
    trained = sum(p.numel() for p in lora_parameters(policy).values())
    notes = {"dropped": dropped, "trainable_parameters": trained}
    return write_trained(policy, log, run.path("sft"), best, notes)


def tokenise_rows(
    frame: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[TokenRow], dict[str, int]]:
    """Return the rows that fit, and how many were left out, by reason.

    A row that does not fit is left out, not cut: a note cut off in the middle would teach the
    model to state what it has not read. Raises DataError when nothing is left.
    """
    rows, dropped = [], Counter()
    for prompt, reference in zip(frame["prompt"], frame["reference"], strict=True):
        if not reference or not reference.strip():
            dropped["empty reference"] += 1
            continue
        row = TokenRow(*encode_completion(tokenizer, prompt, reference))
        if row.length > max_length:
            dropped["longer than model.max_length"] += 1
        else:
            rows.append(row)
    if not rows:
        raise DataError(
            f"None of {len(frame)} rows can be trained on: {dict(dropped)}.",
            f"Raise model.max_length (now {max_length}) or shorten the notes.",
        )
    return rows, dict(dropped)


def make_task(rows: Sequence[TokenRow], validation: Sequence[TokenRow], pad_id: int) -> Task:
    """Mean negative log-likelihood of completion tokens, and how often the top token is right.

    The rate rises over the warm-up, then falls to zero in a straight line.
    """

    def collate(rows: Sequence[TokenRow], training: bool) -> Batch:
        input_ids, mask = pad_rows(rows, pad_id)
        return {"input_ids": input_ids, "completion_mask": mask, "counts": mask.sum(1)}

    def measure(model: Module, batch: Batch, weight: float) -> tuple[Tensor, Metrics]:
        scores = model(score_completions, batch["input_ids"], batch["completion_mask"])
        return measure_tokens(*scores, weight)

    return Task("sft", rows, validation, collate, measure, {"loss": 1.0}, "linear")


def measure_tokens(
    logps: Tensor, hits: Tensor, token_weight: float = 1.0
) -> tuple[Tensor, Metrics]:
    """Return the SFT loss, a scalar, and its metrics as name -> (sum, how many), from the log-prob
    (nats) of every completion token and whether it was the most likely one."""
    nll = -logps.detach().sum()
    metrics = {"loss": (nll, len(logps)), "token_accuracy": (hits.sum(), len(hits))}
    return -logps.mean() * token_weight, metrics
