"""The guardrail: what the policy writes while it is trained, which no training curve shows.

Reward accuracy can read 1.00 while the policy breaks.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from hallulib.checkpoints import Log
from hallulib.detectors import Source, get_detector
from hallulib.generation import generate_summaries, limit_new_tokens
from hallulib.models import save_adapter
from hallulib.processes import gather_from_all, is_main_process
from hallulib.recipe_sections import DpoSection


class Guardrail:
    """A watch of the training loop: it summarises and judges notes before the first step, every
    `guardrail_steps`, and after the last; under several processes in each of them."""

    def __init__(
        self, policy: PeftModel, tokenizer: PreTrainedTokenizerBase, notes: list[dict[str, Any]],
        section: DpoSection, batch_size: int, log: Log,
    ) -> None:  # fmt: skip
        self.policy, self.tokenizer, self.section, self.log = policy, tokenizer, section, log
        self.notes, self.batch_size = notes[: section.guardrail_notes], batch_size
        self.best = log.folder / "guardrail-best"

    def __call__(self, step: int, is_last: bool) -> bool:
        """Look if it is time to; returns whether to stop: after `guardrail_patience` looks with no
        new best. The best adapter so far is kept in `best`."""
        if not self.notes or not (is_last or step % self.section.guardrail_steps == 0):
            return False
        self.log.write(step, self.look())
        if not self.section.guardrail_patience:
            return False
        # The main process decides, so that rounding elsewhere cannot part them.
        waited = gather_from_all(count_since_best(score_checks(self.log.rows)))[0]
        if waited == 0 and is_main_process():
            save_adapter(self.policy, self.best)
        return waited >= self.section.guardrail_patience

    def load_best(self) -> int:
        """Put the best adapter on the policy; returns the step it was seen at."""
        self.policy.load_adapter(str(self.best), "default", is_trainable=True)
        steps = [row["step"] for row in self.log.rows if "guardrail/answer_rate" in row]
        return steps[-1 - count_since_best(score_checks(self.log.rows))]

    def look(self) -> dict[str, float]:
        """Summarise and judge with the policy as it is now."""
        prompts = [note["prompt"] for note in self.notes]
        limit = limit_new_tokens(self.tokenizer, [note["reference"] for note in self.notes])
        generated = generate_summaries(
            self.policy, self.tokenizer, prompts, batch_size=self.batch_size, max_new_tokens=limit
        )
        return rate_summaries(self.notes, [samples[0].text for samples in generated])


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
    """Return the guardrail/* rates, as the evaluation defines them, of summaries of rows (context,
    facts): judged by the facts where they are known, elsewhere by the rules. A rate of nothing is
    left out."""
    found: Counter[str] = Counter()
    for row, summary in zip(rows, summaries, strict=True):
        facts = json.loads(row["facts"]) if row["facts"] else None
        detector = get_detector("facts" if facts else "entities")
        judged = detector.judge(Source(row["context"], facts), summary)
        found["hallucinated"] += judged.hallucinated is True
        found["answered"] += judged.answered
        found["omitted"] += len(judged.omissions)
        found["stated"] += judged.stated
        found["words"] += len(summary.split())
    rates = {  # of how many
        "answer_rate": (found["answered"], len(rows)),
        "mean_words": (found["words"], len(rows)),
        "hallucination_rate": (found["hallucinated"], found["answered"]),
        "omission_rate": (found["omitted"], found["stated"]),
    }
    return {f"guardrail/{name}": k / n for name, (k, n) in rates.items() if n}
