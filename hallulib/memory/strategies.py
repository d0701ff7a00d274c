"""Ways to hold policy and reference in memory for DPO, told apart by what is loaded and trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hallulib.errors import HallulibError


@dataclass(frozen=True)
class Strategy:
    """What a pass runs and keeps in memory.

    `runs`: an SFT step, a DPO step, a reference pass, or sampling. `reference`: where a DPO step
    has its reference from: a second model on the card ("model") or in host memory ("host"), a
    second adapter on the same model ("adapter"), or log-probabilities stored before ("cache").
    `quantization` None takes the recipe's.
    """

    name: str
    title: str
    runs: Literal["sft", "dpo", "reference", "generation"]
    reference: Literal["model", "host", "adapter", "cache"] = "cache"
    quantization: Literal["none", "nf4", "int8"] | None = None

    @property
    def base_copies(self) -> int:
        """Base models on the card."""
        return 2 if self.reference == "model" else 1

    @property
    def adapter_copies(self) -> int:
        """Adapters on the card."""
        return 2 if self.reference in ("model", "adapter") else 1

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.runs in ("sft", "dpo")

    @property
    def passes(self) -> int:
        """Forward passes that a step costs, with checkpointing: forward, recomputation, backward
        (two thirds of one without weights to train, counted as one), and a reference if it is run.
        """
        if not self.trains:
            return 1
        return 3 + (self.runs == "dpo" and self.reference != "cache")


_ALL = (
    Strategy("sft", "SFT", "sft"),
    Strategy("dual_model", "two models, unquantised", "dpo", "model", "none"),
    Strategy("dual_8bit", "two models, int8", "dpo", "model", "int8"),
    Strategy("dual_4bit", "two models, NF4", "dpo", "model", "nf4"),
    Strategy("reference_on_cpu", "reference model in host memory", "dpo", "host"),
    Strategy("adapter_copy", "one model, adapter copied", "dpo", "adapter"),
    Strategy("cached_reference_pass1", "cached reference, pass 1: reference", "reference"),
    Strategy("cached_reference_pass2", "cached reference, pass 2: training", "dpo"),
    Strategy("generation", "sampling summaries", "generation"),
)
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}


def find_strategy(name: str) -> Strategy:
    """Return the strategy of that name. Raises HallulibError when there is none."""
    if name not in STRATEGIES:
        raise HallulibError(
            f"There is no strategy '{name}'.",
            f"Use cached_reference or one of {', '.join(STRATEGIES)}.",
        )
    return STRATEGIES[name]
