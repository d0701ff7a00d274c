"""The guardrail: what the policy writes while it is trained, which no training curve shows.

Reward accuracy can read 1.00 while the policy breaks. So a few validation notes are summarised
and judged every few steps; hallucination rate and omission rate go beside the losses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hallulib.adapters import save_adapter
from hallulib.detectors import Detector, Source, get_detector
from hallulib.files import write_json_atomic
from hallulib.generation import generate_summaries, limit_new_tokens
from hallulib.metrics_log import MetricsLog
from hallulib.processes import gather_from_all, is_main_process
from hallulib.recipe import Recipe

BEST_FOLDER = "guardrail-best"
STEP_FILE = "step.json"


class Guardrail(TrainerCallback):
    """Summarises and judges the first `dpo.guardrail_notes` validation notes with `policy`.

    It runs before the first step, every `dpo.guardrail_steps`, and after the last; under several
    processes in each of them. The rates are defined as in the evaluation.
    """

    def __init__(
        self,
        policy: PeftModel,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        validation: pd.DataFrame,
        log: MetricsLog,
    ) -> None:
        self.policy, self.recipe, self.tokenizer, self.log = policy, recipe, tokenizer, log
        self.rows = validation.head(recipe.dpo.guardrail_notes).to_dict("records")
        self.max_new_tokens = limit_new_tokens(tokenizer, [r["reference"] for r in self.rows])

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._check(state, control)

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step >= state.max_steps
        if last or state.global_step % self.recipe.dpo.guardrail_steps == 0:
            self._check(state, control)

    def _check(self, state, control) -> None:
        """Measure and log; with `dpo.guardrail_patience`, keep the best adapter or stop."""
        self.log.write(state.global_step, self.measure())
        if not self.recipe.dpo.guardrail_patience:
            return
        # The main process decides, so that rounding elsewhere cannot part them.
        waited = gather_from_all(count_since_best(score_checks(self.log.rows)))[0]
        if waited >= self.recipe.dpo.guardrail_patience:
            tqdm.write(f"step {state.global_step}: {waited} guardrail checks without a new best")
            control.should_training_stop = True
        elif waited == 0 and is_main_process():
            folder = self.log.file.parent / BEST_FOLDER
            save_adapter(self.policy, folder, self.recipe)
            write_json_atomic(folder / STEP_FILE, {"step": state.global_step})

    def measure(self) -> dict[str, float]:
        """Summarise and judge with the policy as it is now."""
        generated = generate_summaries(
            self.policy,
            self.tokenizer,
            [row["prompt"] for row in self.rows],
            batch_size=self.recipe.evaluation.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        return rate_summaries(self.rows, [samples[0].text for samples in generated])


def score_checks(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Return the sum of hallucination and omission rate of every guardrail check in the log."""
    names = ("guardrail/hallucination_rate", "guardrail/omission_rate")
    checks = [row for row in rows if "guardrail/answer_rate" in row]
    # A policy that answers nothing has no hallucination rate, and must not count as good.
    return [sum(row.get(name, 1.0) for name in names) for row in checks]


def count_since_best(scores: Sequence[float]) -> int:
    """Return how many scores came after the best one: the lowest, of equal ones the last."""
    return list(scores)[::-1].index(min(scores)) if len(scores) else 0


def rate_summaries(rows: list[dict[str, Any]], summaries: list[str]) -> dict[str, float]:
    """Return the guardrail/* rates of summaries of rows (prompt, context, facts).

    answer_rate: summaries with at least one statement that could be read, of all.
    hallucination_rate: those with at least one wrong statement, of the answered ones.
    omission_rate: what is left out, of all that the notes state. A rate of nothing is left out.
    """
    hallucinated = answered = omitted = stated = words = 0
    for row, summary in zip(rows, summaries, strict=True):
        facts = json.loads(row["facts"]) if row["facts"] else None
        judged = pick_detector(facts).judge(Source(row["context"], facts), summary)
        hallucinated += judged.hallucinated is True
        answered += judged.answered
        omitted += len(judged.omissions)
        stated += judged.stated
        words += len(summary.split())
    rates = {
        "guardrail/answer_rate": answered / len(rows),
        "guardrail/mean_words": words / len(rows),
    }
    if answered:
        rates["guardrail/hallucination_rate"] = hallucinated / answered
    if stated:
        rates["guardrail/omission_rate"] = omitted / stated
    return rates


def pick_detector(facts: dict | None) -> Detector:
    """The exact checker where the facts are known, the rule-based one elsewhere."""
    return get_detector("facts" if facts else "entities")
