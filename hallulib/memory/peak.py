"""The predicted peak of one pass, term by term, from a configuration alone.

First form: parameters are counted exactly, activations and logits come from formulas (`method` says
"analytic"). Nothing here needs weights or a GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from hallulib.errors import ModelError
from hallulib.memory.activations import (
    DecoderShape,
    Step,
    activation_bytes,
    layer_peak_bytes,
    logit_bytes,
)
from hallulib.memory.counts import ParameterCounts, count_parameters
from hallulib.memory.strategies import STRATEGIES, Strategy
from hallulib.paths import display_path
from hallulib.recipe import Recipe

GIB = 2**30
# CUDA context, driver and a desktop on the same card. The context alone was 0.14 GiB on a T4; with
# a screen attached, 0.75 GiB of a 12 GiB card were not to be had.
CUDA_CONTEXT_BYTES = int(0.75 * GIB)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TERMS = (
    "base_weights", "quantisation_constants", "lora_weights", "gradients", "optimiser_states",
    "activations", "logits", "cuda_context",
)


@dataclass(frozen=True)
class MemoryBudget:
    """Predicted peak of one pass, in bytes per term. `rows` sequences of `sequence_tokens` tokens,
    `completion_tokens` of each scored."""

    model: str
    strategy: str
    title: str
    quantization: str
    rows: int
    sequence_tokens: int
    completion_tokens: int
    base_weights: int
    quantisation_constants: int
    lora_weights: int
    gradients: int
    optimiser_states: int
    activations: int
    logits: int
    cuda_context: int
    method: str = "analytic"

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by term, in the order of a stacked bar."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def total(self) -> int:
        """Predicted peak in bytes."""
        return sum(self.terms.values())

    def fits(self, card_gb: float) -> bool:
        """Whether the peak is within a card of `card_gb` GiB. An estimate: a margin of less than
        ~10 % is no promise."""
        return self.total <= card_gb * GIB

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the total."""
        return asdict(self) | {"total": self.total}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MemoryBudget:
        """Read back what `to_dict` gave (a "total" or "fits" beside it is recomputed, not read)."""
        names = cls.__dataclass_fields__
        return cls(**{name: value for name, value in values.items() if name in names})


def predict_peak(
    model_config: PretrainedConfig, recipe: Recipe, strategy: str = "cached_reference",
    *, sequence_tokens: int = 0, completion_tokens: int = 0, device: str = "cuda",
    head: str = "chunked",
) -> MemoryBudget:
    """Predicted peak of one pass of `strategy` with the recipe's LoRA, precision and batch.

    `sequence_tokens` is prompt + completion of the longest row (0: the recipe's max_length),
    `completion_tokens` its scored part (0: half). "cached_reference" is the larger of its passes.
    `head` "chunked" is what this project trains with; "completion" and "full" are what it saves.
    Raises ModelError for no decoder, an unknown strategy or head, or more tokens than positions.
    """
    if strategy == "cached_reference":
        passes = ("cached_reference_pass1", "cached_reference_pass2")
        both = [
            predict_peak(
                model_config, recipe, name, sequence_tokens=sequence_tokens,
                completion_tokens=completion_tokens, device=device, head=head,
            )
            for name in passes
        ]
        return max(both, key=lambda budget: budget.total)
    plan, shape = _find_strategy(strategy), DecoderShape.from_config(model_config)
    tokens = sequence_tokens or recipe.model.max_length
    if tokens > shape.positions:
        raise ModelError(
            f"{tokens} tokens are more than the {shape.positions} positions of this model.",
            "Shorten the sequences (model.max_length).",
        )
    completion = min(completion_tokens or tokens // 2, tokens)
    step = _make_step(plan, recipe, tokens, completion, head)
    counts = count_parameters(model_config, recipe.lora)
    return _add_up(plan, recipe, step, counts, shape, device)


def _find_strategy(name: str) -> Strategy:
    if name not in STRATEGIES:
        raise ModelError(
            f"There is no strategy '{name}'.",
            f"Use cached_reference or one of {', '.join(STRATEGIES)}.",
        )
    return STRATEGIES[name]


def _make_step(plan: Strategy, recipe: Recipe, tokens: int, completion: int, head: str) -> Step:
    if head not in ("chunked", "completion", "full"):
        raise ModelError(f"There is no head '{head}'.", "Use chunked, completion or full.")
    rows = {
        "sft": recipe.sft.batch_size,
        "reference": 2 * recipe.reference.batch_size,
        "dpo": 2 * recipe.dpo.batch_size,
    }[plan.rows]
    return Step(
        rows=rows,
        tokens=tokens,
        scored=completion,
        dtype_bytes=DTYPE_BYTES[recipe.model.dtype],
        trains=plan.trains,
        checkpointing=recipe.model.gradient_checkpointing,
        quantization=plan.quantization or recipe.model.quantization,
        attention=recipe.model.attention,
        head=head,
    )


def _add_up(
    plan: Strategy, recipe: Recipe, step: Step, counts: ParameterCounts, shape: DecoderShape,
    device: str,
) -> MemoryBudget:
    """Sum the terms at the peak: kept activations, and on top the wider of the two humps, that of
    the logits (end of the forward pass) or that of one layer (backward pass)."""
    trained = counts.lora if plan.trains else 0
    kept = activation_bytes(shape, recipe.lora, step)
    layer, logits = layer_peak_bytes(shape, recipe.lora, step), logit_bytes(shape, step)
    return MemoryBudget(
        model=_show_name(recipe.model.name_or_path),
        strategy=plan.name,
        title=plan.title,
        quantization=step.quantization,
        rows=step.rows,
        sequence_tokens=step.tokens,
        completion_tokens=step.scored,
        base_weights=plan.base_copies * counts.base_bytes(step.quantization, step.dtype_bytes),
        quantisation_constants=plan.base_copies * counts.constant_bytes(step.quantization),
        lora_weights=4 * counts.lora * plan.adapter_copies,  # peft keeps the adapter in fp32
        gradients=4 * trained,
        optimiser_states=8 * trained,  # AdamW: two fp32 moments
        activations=kept + (layer if layer > logits else 0),
        logits=logits if logits >= layer else 0,
        cuda_context=CUDA_CONTEXT_BYTES if device == "cuda" else 0,
    )


def _show_name(name_or_path: str) -> str:
    """A hub id or relative path as it is; an absolute one as a reader may see it."""
    return display_path(name_or_path) if Path(name_or_path).is_absolute() else name_or_path
