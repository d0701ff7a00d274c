"""Ways to hold policy and reference in memory for DPO, told apart by what is loaded and trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Strategy:
    """What a pass keeps in memory.

    `quantization` None takes the recipe's. `rows` says whose micro-batch it runs: "sft" rows,
    "reference" pairs or "dpo" pairs (a pair is two rows).
    """

    name: str
    title: str
    base_copies: int
    adapter_copies: int
    trains: bool
    rows: Literal["sft", "reference", "dpo"] = "dpo"
    quantization: Literal["none", "nf4", "int8"] | None = None


_ALL = (
    Strategy("sft", "SFT", 1, 1, trains=True, rows="sft"),
    Strategy("dual_model", "two models, unquantised", 2, 2, trains=True, quantization="none"),
    Strategy("dual_8bit", "two models, int8", 2, 2, trains=True, quantization="int8"),
    Strategy("dual_4bit", "two models, NF4", 2, 2, trains=True, quantization="nf4"),
    Strategy("adapter_copy", "one model, adapter copied", 1, 2, trains=True),
    Strategy(
        "cached_reference_pass1", "cached reference, pass 1: reference", 1, 1, trains=False,
        rows="reference",
    ),
    Strategy("cached_reference_pass2", "cached reference, pass 2: training", 1, 1, trains=True),
)
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}
