"""The predicted peak of one pass, term by term, from a configuration alone.

The project's own step runs on fake tensors. Live bytes are linear in the number of layers, so three
shallow models tell them for a deep one. What a GPU's allocator makes of them depends on the order
of all requests: for that the whole model is traced and replayed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PretrainedConfig

from hallulib.errors import HallulibError
from hallulib.memory.allocator import replay_trace
from hallulib.memory.passes import STRATEGIES, StepShape, Strategy, find_strategy, trace_strategy
from hallulib.memory.skeleton import cut_layers, has_equal_layers
from hallulib.memory.tracker import Trace
from hallulib.recipe import Recipe

GIB = 2**30
# CUDA context, driver and a desktop on the same card. The context alone was 0.14 GiB on a T4; with
# a screen attached, 0.75 GiB of a 12 GiB card were not to be had. A constant, not predicted.
CUDA_CONTEXT_BYTES = int(0.75 * GIB)
WEIGHTS = ("base_weights", "quantisation_constants", "lora_weights")
TERMS = (*WEIGHTS, "gradients", "optimiser_states", "activations", "logits", "temporaries")
SHALLOW = (2, 3, 4)  # layers that are traced where all are alike
Terms = dict[str, int]  # term -> bytes alive at one instant


@dataclass(frozen=True)
class MemoryBudget:
    """Predicted peak of one pass, in bytes. `rows` sequences (SFT, sampling) or pairs (DPO) of
    `tokens` tokens.

    `terms` are what is alive at the peak, what the allocator holds beyond, and the context; on a
    CPU the last two are 0. `allocated` and `reserved` are what torch.cuda would report, `needed` is
    the least memory in which the allocator survives; the last two are None where nothing was
    replayed. `phase` is where the peak lies, `host` what lies in host memory.
    """

    strategy: str
    rows: int
    tokens: int
    phase: str
    terms: Terms
    allocated: int
    reserved: int | None
    needed: int | None
    host: int = 0

    @property
    def title(self) -> str:
        """The strategy in words."""
        return STRATEGIES[self.strategy].title

    @property
    def total(self) -> int:
        """Bytes taken from the device at most: reserved (or, not replayed, live) and context."""
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """The term that dominates at the peak."""
        return max(self.terms, key=lambda name: self.terms[name])

    def fits(self, card_gb: float) -> bool:
        """Whether the pass runs on a card of `card_gb` GiB: what is left beside the context is
        enough for the replayed allocator. Raises HallulibError where only a replay can tell."""
        room = card_gb * GIB - self.terms["cuda_context"]
        if self.needed is None and self.allocated <= room:
            raise HallulibError(
                f"Whether '{self.title}' fits {card_gb:g} GiB is known from a replay only.",
                "Predict it with replay=True: the whole model is traced, in some seconds.",
            )
        return (self.needed or self.allocated) <= room


def predict_peak(
    config: PretrainedConfig,
    recipe: Recipe,
    strategy: str,
    *,
    rows: int = 0,
    tokens: int = 0,
    completion: int = 0,
    device: str = "cuda",
    replay: bool = True,
) -> MemoryBudget:
    """Return the peak of one pass of `strategy` with the recipe's LoRA, precision and batch.

    0 takes the recipe's micro-batch, its max_length, and half of the tokens. On a GPU `replay` says
    whether what the allocator reserves is predicted too: seconds for an 8B model, where live bytes
    take one. The same question is answered once. Raises HallulibError for no decoder, an unknown
    strategy, more tokens than positions, and a model whose code cannot run on fake tensors.
    """
    plan = find_strategy(strategy)
    shape = make_shape(config, recipe, plan, (rows, tokens, completion))
    precision = plan.quantization or recipe.model.quantization
    model = recipe.model.model_copy(update={"quantization": precision, "name_or_path": ""})
    traced = recipe.model_copy(update={"name": "traced", "model": model})
    replay = replay and device == "cuda"
    # The peak is the policy's own, so without a replay a reference only adds what is loaded of it.
    adds = plan.reference == "host" or plan.reference != "cache" and not replay
    terms, phase, sizes = _trace_peak(
        type(config), config.to_json_string(use_diff=False), traced.model_dump_json(),
        "cached_reference_pass2" if adds else strategy, shape, device == "cuda", replay,
    )  # fmt: skip
    terms, host = _add_reference(terms, plan.reference) if adds else (dict(terms), 0)
    live = sum(terms.values())
    unknown = None if device == "cuda" else live
    allocated, reserved, needed = sizes or (live, unknown, unknown)
    terms["allocator_slack"] = (reserved or live) - live
    terms["cuda_context"] = CUDA_CONTEXT_BYTES if device == "cuda" else 0
    return MemoryBudget(
        strategy, shape.rows, shape.tokens, phase, terms, allocated, reserved, needed, host
    )


def _add_reference(terms: Terms, place: str) -> tuple[Terms, int]:
    """Return the terms with the weights of a reference, and those that lie in host memory."""
    if place == "host":
        return dict(terms), sum(terms[term] for term in WEIGHTS)
    loaded = ("lora_weights",) if place == "adapter" else WEIGHTS
    return terms | {term: 2 * terms[term] for term in loaded}, 0


@lru_cache(maxsize=512)
def _trace_peak(
    kind: type[PretrainedConfig], config_json: str, recipe_json: str, strategy: str,
    shape: StepShape, on_cuda: bool, replay: bool,
) -> tuple[Terms, str, tuple[int, int, int] | None]:  # fmt: skip
    """Return what is alive at the peak and in which phase, and where `replay` asks for it what a
    GPU allocates, reserves and needs. By plain values, so that an answer is found again."""
    config = kind.from_dict(json.loads(config_json))
    recipe, plan = Recipe.model_validate_json(recipe_json), find_strategy(strategy)
    try:
        if not replay:
            return *_predict_live(config, recipe, plan, shape, on_cuda), None
        trace = trace_strategy(config, recipe, plan, shape, on_cuda)
    except HallulibError:
        raise
    except Exception as error:  # whatever a foreign architecture raises on tensors without values
        raise HallulibError(
            f"A '{config.model_type}' model cannot be traced: it does not run on tensors without "
            f"values ({type(error).__name__}: {str(error).splitlines()[0][:120]}).",
            "Its memory cannot be predicted; start the stage with --force and watch the card.",
        ) from error
    section = recipe.sft if plan.runs == "sft" else recipe.dpo
    accumulates = plan.trains and section.gradient_accumulation > 1
    return *list_terms(trace), replay_trace(trace, accumulates)


def make_shape(
    config: PretrainedConfig, recipe: Recipe, plan: Strategy, asked: tuple[int, int, int]
) -> StepShape:
    """Return the batch for `asked` rows, tokens and completion tokens, 0 for the recipe's own.
    Raises HallulibError where the model cannot take it."""
    tokens = asked[1] or recipe.model.max_length
    positions = getattr(config.get_text_config(), "max_position_embeddings", tokens)
    if tokens > positions:
        raise HallulibError(
            f"{tokens} tokens are more than the {positions} positions of this model.",
            "Shorten the sequences (model.max_length).",
        )
    rows = {
        "sft": recipe.sft.batch_size, "reference": recipe.reference.batch_size,
        "dpo": recipe.dpo.batch_size, "generation": recipe.pairs.batch_size,
    }[plan.runs]  # fmt: skip
    may_share = recipe.dpo.prefix_sharing == "auto" and recipe.model.attention == "sdpa"
    shared = plan.runs in ("dpo", "reference") and may_share
    completion = min(asked[2] or tokens // 2, tokens - 1)
    return StepShape(asked[0] or rows, tokens, completion, shared)


def list_terms(trace: Trace) -> tuple[Terms, str]:
    """Return the bytes alive at the peak by term, and the phase in which it lies."""
    return _pick_largest(list_peaks(trace))


def list_peaks(trace: Trace, layers: int = 0) -> dict[str, Terms]:
    """Return the bytes alive at the peak of every phase, by term.

    What the forward pass made and still holds at its end is an activation kept; the rest of what a
    pass makes is temporary. With `layers` the backward pass is cut where all layers but the first
    have their gradients: there the gradients of many layers may outgrow what else is alive.
    """
    live, parts = trace.list_live(), trace.list_phases()
    kept: set[int] = set()
    for name, start, end in parts:
        if name == "forward" and parts[-1][0] != "forward":
            kept = trace.list_born(start, end) & set(trace.list_alive(end))
    if layers:
        parts = [cut for part in parts for cut in _cut_backward(trace, part, layers)]
    peaks = {}
    for name, start, end in parts:
        if end == start:
            continue
        at = max(range(start, end), key=live.__getitem__)
        terms = dict.fromkeys(TERMS, 0)
        for storage in trace.list_alive(at + 1):
            unnamed = "activations" if storage in kept else "temporaries"
            term = trace.labels[storage] or unnamed
            terms[term] += trace.sizes[storage]
        peaks[name] = terms
    return peaks


def _cut_backward(
    trace: Trace, part: tuple[str, int, int], layers: int
) -> list[tuple[str, int, int]]:
    name, start, end = part
    events = enumerate(trace.events[start:end], start)
    births = [at for at, e in events if e > 0 and trace.labels[e - 1] == "gradients"]
    if name != "backward" or not births:
        return [part]
    cut = births[len(births) - len(births) // layers - 1] + 1
    return [(name, start, cut), ("backward, first layer", cut, end)]


def _pick_largest(peaks: dict[str, Terms]) -> tuple[Terms, str]:
    phase = max(peaks, key=lambda name: sum(peaks[name].values()))
    return peaks[phase], phase


def _predict_live(
    config: PretrainedConfig, recipe: Recipe, plan: Strategy, shape: StepShape, on_cuda: bool
) -> tuple[Terms, str]:
    """What is alive at the peak, from shallow models where all layers are alike and three of them
    lie on a line; else from the whole model."""

    def trace_layers(count: int) -> Trace:
        return trace_strategy(cut_layers(config, count), recipe, plan, shape, on_cuda)

    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if depth > SHALLOW[-1] and has_equal_layers(config):
        peaks = [list_peaks(trace_layers(count), count) for count in SHALLOW]
        extended = extend_peaks(peaks, depth)
        if extended:
            return _pick_largest(extended)
    return list_terms(trace_strategy(config, recipe, plan, shape, on_cuda))


def extend_peaks(shallow: list[dict[str, Terms]], depth: int) -> dict[str, Terms] | None:
    """Return the peaks of a model of `depth` layers from those of two, three and four; None where
    these do not lie on a line, term by term."""
    two, three, four = shallow
    if not two.keys() == three.keys() == four.keys():
        return None
    extended: dict[str, Terms] = {}
    for phase, terms in two.items():
        steps = {term: three[phase][term] - size for term, size in terms.items()}
        if any(four[phase][term] - three[phase][term] != step for term, step in steps.items()):
            return None
        further = depth - SHALLOW[0]
        extended[phase] = {term: size + further * steps[term] for term, size in terms.items()}
    return extended


def change_recipe(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Return a copy with dotted settings changed."""
    values = recipe.to_dict()
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return Recipe.model_validate(values)
