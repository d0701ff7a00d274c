"""The guardrail: what the policy writes while it is trained, which no training curve shows.

Reward accuracy can read 1.00 while the policy breaks. So a few validation notes are summarised
and judged every few steps; hallucination rate and omission rate go beside the losses.
"""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hallulib.detectors import Detector, Source, get_detector
from hallulib.generation import generate_summaries, limit_new_tokens
from hallulib.recipe import Recipe
from hallulib.training import MetricsLog


class Guardrail(TrainerCallback):
    """Summarises and judges the first `dpo.guardrail_notes` validation notes.

    It runs before the first step, every `dpo.guardrail_steps`, and after the last. The rates are
    defined as in the evaluation.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        validation: pd.DataFrame,
        log: MetricsLog,
    ) -> None:
        self.recipe, self.tokenizer, self.log = recipe, tokenizer, log
        self.rows = validation.head(recipe.dpo.guardrail_notes).to_dict("records")
        self.max_new_tokens = limit_new_tokens(tokenizer, [r["reference"] for r in self.rows])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.log.write(0, self.measure(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        last = state.global_step >= state.max_steps
        if last or state.global_step % self.recipe.dpo.guardrail_steps == 0:
            self.log.write(state.global_step, self.measure(model))

    def measure(self, model) -> dict[str, float]:
        """Summarise and judge with the policy as it is now."""
        generated = generate_summaries(
            model,
            self.tokenizer,
            [row["prompt"] for row in self.rows],
            batch_size=self.recipe.evaluation.batch_size,
            max_new_tokens=self.max_new_tokens,
        )
        return rate_summaries(self.rows, [samples[0].text for samples in generated])


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
