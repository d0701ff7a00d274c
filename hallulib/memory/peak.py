"""The predicted peak of one pass, term by term, from a configuration alone.

The project's own step runs on fake tensors; what was alive when is then replayed through a model of
CUDA's allocator. Nothing here needs weights or a GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from hallulib.errors import HallulibError
from hallulib.files import display_path
from hallulib.memory import allocator, analytic
from hallulib.memory.counts import require_decoder
from hallulib.memory.layers import trace_by_layers
from hallulib.memory.prediction_cache import PredictionCache
from hallulib.memory.steps import HEADS, PAGED, StepShape
from hallulib.memory.strategies import Strategy, find_strategy
from hallulib.memory.tracing import Levers, trace_strategy
from hallulib.recipe import Recipe
from hallulib.tracker import Trace

GIB = 2**30
# CUDA context, driver and a desktop on the same card. The context alone was 0.14 GiB on a T4; with
# a screen attached, 0.75 GiB of a 12 GiB card were not to be had. A constant, not predicted.
CUDA_CONTEXT_BYTES = int(0.75 * GIB)
TERMS = (
    "base_weights", "quantisation_constants", "lora_weights", "gradients", "optimiser_states",
    "activations", "logits", "temporaries", "allocator_slack", "cuda_context",
)


@dataclass(frozen=True)
class MemoryBudget:
    """Predicted peak of one pass, in bytes. `rows` sequences (SFT, sampling) or pairs (DPO) of
    `sequence_tokens` tokens, `completion_tokens` of each scored.

    `terms` are what is alive at the peak, what the allocator holds beyond, and the context; on a
    CPU the last two are 0. `allocated` and `reserved` are what torch.cuda would report, `needed` is
    the least memory in which the allocator survives. `phase` is where the peak lies, `host` what
    lies in host memory, `method` "traced" or "analytic: why".
    """

    model: str
    strategy: str
    title: str
    quantization: str
    rows: int
    sequence_tokens: int
    completion_tokens: int
    checkpointing: bool
    head: str
    device: str
    phase: str
    terms: dict[str, int]
    allocated: int
    reserved: int
    needed: int
    host: int = 0
    passes: int = 1
    method: str = "traced"

    @property
    def total(self) -> int:
        """Bytes taken from the device at most: reserved, and the context."""
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """The term that dominates at the peak."""
        return max(self.terms, key=lambda name: self.terms[name])

    def fits(self, card_gb: float) -> bool:
        """Whether the pass runs on a card of `card_gb` GiB: what is left beside the context is
        enough for the replayed allocator."""
        return self.needed + self.terms["cuda_context"] <= card_gb * GIB

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the total."""
        return asdict(self) | {"total": self.total}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MemoryBudget:
        """Read back what `to_dict` gave (a "total" or "fits" beside it is recomputed, not read)."""
        names = cls.__dataclass_fields__
        return cls(**{name: value for name, value in values.items() if name in names})


@dataclass(frozen=True)
class Question:
    """One prediction to make: `rows` 0 takes the recipe's micro-batch, `sequence_tokens` 0 its
    max_length, `completion_tokens` 0 half of them."""

    strategy: str = "cached_reference"
    sequence_tokens: int = 0
    completion_tokens: int = 0
    rows: int = 0
    device: str = "cuda"
    head: str = "chunked"
    levers: Levers = field(default_factory=Levers)


def predict_peak(
    model_config: PretrainedConfig, recipe: Recipe, strategy: str = "cached_reference",
    *, levers: Levers | None = None, cache: PredictionCache | None = None, **asked: Any,
) -> MemoryBudget:
    """Predicted peak of one pass of `strategy` with the recipe's LoRA, precision and batch.

    Further keywords are those of :class:`Question`. "cached_reference" is the larger of its passes.
    A prediction that was made before is read from `cache`. Raises HallulibError for no decoder, an
    unknown strategy or head, or more tokens than positions.
    """
    if strategy == "cached_reference":
        passes = ("cached_reference_pass1", "cached_reference_pass2")
        both = [
            predict_peak(model_config, recipe, name, levers=levers, cache=cache, **asked)
            for name in passes
        ]
        return max(both, key=lambda budget: budget.total)
    if strategy == "reference_on_cpu":  # on the card, what is trained against a cache
        name = "cached_reference_pass2"
        budget = predict_peak(model_config, recipe, name, levers=levers, cache=cache, **asked)
        plan = find_strategy(strategy)
        weights = ("base_weights", "quantisation_constants", "lora_weights")
        host = budget.host + sum(budget.terms[term] for term in weights)
        return replace(budget, strategy=strategy, title=plan.title, host=host, passes=plan.passes)
    question = Question(strategy, levers=levers or Levers(), **asked)
    question = replace(question, levers=replace(question.levers, on_cuda=question.device == "cuda"))
    plan = find_strategy(strategy)
    shape = make_shape(model_config, recipe, plan, question)
    if plan.quantization:
        recipe = change_recipe(recipe, {"model.quantization": plan.quantization})
    cache = cache or PredictionCache.default()
    how = {"strategy": strategy, "device": question.device, "levers": asdict(question.levers)}
    key = cache.make_key(model_config, recipe, how, asdict(shape))
    found = cache.get(key)
    if found is None:
        found = _predict(model_config, recipe, plan, shape, question).to_dict()
        cache.put(key, found)
    return replace(MemoryBudget.from_dict(found), model=show_name(recipe.model.name_or_path))


def make_shape(
    config: PretrainedConfig, recipe: Recipe, plan: Strategy, question: Question
) -> StepShape:
    """Return the batch that is asked for. Raises HallulibError where the model cannot take it."""
    require_decoder(config)
    if question.head not in HEADS:
        heads = ", ".join(HEADS)
        raise HallulibError(f"There is no head '{question.head}'.", f"Use one of {heads}.")
    tokens = question.sequence_tokens or recipe.model.max_length
    positions = getattr(config.get_text_config(), "max_position_embeddings", tokens)
    if tokens > positions:
        raise HallulibError(
            f"{tokens} tokens are more than the {positions} positions of this model.",
            "Shorten the sequences (model.max_length).",
        )
    completion = min(question.completion_tokens or tokens // 2, tokens - 1)
    rows = {
        "sft": recipe.sft.batch_size, "reference": recipe.reference.batch_size,
        "dpo": recipe.dpo.batch_size, "generation": recipe.pairs.batch_size,
    }[plan.runs]  # fmt: skip
    may_share = recipe.dpo.prefix_sharing == "auto" and recipe.model.attention == "sdpa"
    pairs = plan.runs in ("dpo", "reference")
    shared = pairs and may_share and question.head != "full"
    return StepShape(question.rows or rows, tokens, completion, question.head, shared)


def _predict(
    config: PretrainedConfig, recipe: Recipe, plan: Strategy, shape: StepShape, question: Question
) -> MemoryBudget:
    section = recipe.sft if plan.runs == "sft" else recipe.dpo
    accumulates = plan.trains and section.gradient_accumulation > 1
    method, host = "traced", 0
    try:
        trace = trace_by_layers(
            lambda some: trace_strategy(some, recipe, plan, shape, question.levers), config
        )
        host = trace.move_to_host(PAGED, "optimiser_states")
        terms, phase = list_terms(trace)
        sizes = _replay(trace, accumulates) if question.device == "cuda" else None
    except HallulibError:
        raise
    except Exception as error:  # whatever a foreign architecture raises on tensors without values
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        method, phase, sizes = f"analytic: the model does not run fake ({reason})", "", None
        terms = analytic.estimate_terms(config, recipe, plan, shape)
    live = sum(terms.values())
    allocated, reserved, needed = sizes or (live, live, live)
    context = CUDA_CONTEXT_BYTES if question.device == "cuda" else 0
    return MemoryBudget(
        model="", strategy=plan.name, title=plan.title, quantization=recipe.model.quantization,
        rows=shape.rows, sequence_tokens=shape.tokens, completion_tokens=shape.completion,
        checkpointing=recipe.model.gradient_checkpointing, head=shape.head,
        device=question.device, phase=phase, allocated=allocated, reserved=reserved,
        needed=needed, host=host, passes=plan.passes, method=method,
        terms=terms | {"allocator_slack": reserved - live, "cuda_context": context},
    )  # fmt: skip


def _replay(trace: Trace, accumulates: bool) -> tuple[int, int, int]:
    """Return allocated, reserved and needed bytes on a GPU."""
    requests = allocator.list_requests(trace, accumulates)
    done = allocator.replay(requests)
    return done.peak_allocated, done.peak_reserved, allocator.find_smallest_limit(requests)


def list_terms(trace: Trace) -> tuple[dict[str, int], str]:
    """Return the bytes alive at the peak by term, and the phase in which it lies.

    What the forward pass made and still holds at its end is an activation kept; the rest of what a
    pass makes is temporary.
    """
    _, at = trace.find_peak()
    phase, _ = trace.find_phase(at)
    parts = {name: end for name, _, end in trace.list_phases()}
    kept = set(trace.list_alive(parts["forward"])) if "backward" in parts else set()
    terms = dict.fromkeys(TERMS[:-2], 0)
    for storage in trace.list_alive(at):
        term = trace.labels[storage]
        if not term:
            is_kept = storage in kept and trace.phases[storage] == "forward"
            term = "activations" if is_kept else "temporaries"
        terms[term] += trace.sizes[storage]
    return terms, phase


def change_recipe(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return a copy with dotted settings changed."""
    values = recipe.to_dict()
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return Recipe.model_validate(values)


def show_name(name_or_path: str) -> str:
    """A hub id or relative path as it is; an absolute one as a reader may see it."""
    return display_path(name_or_path) if Path(name_or_path).is_absolute() else name_or_path
