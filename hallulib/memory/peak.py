"""The predicted peak of one pass, term by term, from a configuration alone.

Live bytes are linear in the number of layers, so three shallow models tell them for a deep one.
What a GPU's allocator makes of them depends on the order of all requests: for that the whole model
is traced and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import pandas as pd

from hallulib.errors import HallulibError
from hallulib.memory.allocator import list_requests, measure_requests
from hallulib.memory.passes import STRATEGIES, StepShape, Strategy, runs_on_cuda, trace_pass
from hallulib.memory.skeleton import cut_layers, has_equal_layers, load_model_config
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
    """Predicted peak of one pass of `rows` sequences or pairs, in bytes, in `phase`.

    `terms` are what is alive, what the allocator holds beyond, and the context; on a CPU the last
    two are 0. `allocated` and `reserved` are what torch.cuda would report, `needed` is the least
    memory in which the allocator survives; the last two are None where nothing was replayed.
    """

    strategy: str
    title: str
    rows: int
    tokens: int
    phase: str
    terms: Terms
    allocated: int
    reserved: int | None
    needed: int | None

    @property
    def total(self) -> int:
        """Bytes taken from the device at most: reserved (or, not replayed, live) and context."""
        return sum(self.terms.values())

    @property
    def largest(self) -> str:
        """The term that dominates at the peak, in words."""
        return max(self.terms, key=self.terms.__getitem__).replace("_", " ")

    def exceeds(self, card_gb: float) -> bool:
        """Whether it is too much for a card of `card_gb` GiB, as far as is known."""
        return (self.needed or self.allocated) > card_gb * GIB - self.terms["cuda_context"]

    def fits(self, card_gb: float) -> bool:
        """Whether it runs on a card of so many GiB. HallulibError where only a replay can tell."""
        if self.needed is None and not self.exceeds(card_gb):
            raise HallulibError("Only a replay can tell what fits.", "Predict with replay=True.")
        return not self.exceeds(card_gb)


def predict_peak(
    recipe: Recipe, strategy: str, *,
    rows: int = 0, tokens: int = 0, completion: int = 0, replay: bool = True,
) -> MemoryBudget:  # fmt: skip
    """Return the peak of one pass of `strategy`; 0 takes the recipe's micro-batch, its max_length,
    and half of the tokens. On a GPU `replay` says whether what the allocator reserves is predicted
    too: seconds for an 8B model, where live bytes take one. Raises HallulibError for no decoder,
    more tokens than positions, and a model whose code cannot run on fake tensors."""
    plan, on_cuda = STRATEGIES[strategy], runs_on_cuda(recipe)
    shape = make_shape(recipe, plan, rows, tokens, completion)
    precision = {"quantization": plan.quantization or recipe.model.quantization}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=precision)})
    replay = replay and on_cuda
    # The peak is the policy's own, so without a replay a reference only adds what is loaded of it.
    adds = {"model": WEIGHTS, "adapter": ("lora_weights",)}.get(plan.reference, ())
    place = plan.reference if replay and adds else "cache"
    traced = plan._replace(title="", quantization=None, reference=place)
    terms, phase, sizes = _trace_peak(recipe.model_dump_json(), traced, shape, replay)
    terms = terms | {term: 2 * terms[term] for term in adds if not replay}
    live = sum(terms.values())
    sizes = sizes or ((live, None, None) if on_cuda else (live, live, live))
    terms["allocator_slack"] = (sizes[1] or live) - live
    terms["cuda_context"] = CUDA_CONTEXT_BYTES if on_cuda else 0
    return MemoryBudget(strategy, plan.title, shape.rows, shape.tokens, phase, terms, *sizes)


def make_shape(
    recipe: Recipe, plan: Strategy, rows: int, tokens: int, completion: int
) -> StepShape:
    """Return the batch for so many rows, tokens and completion tokens, 0 for the recipe's own.
    Raises HallulibError for more tokens than the model has positions."""
    config = load_model_config(recipe.model.name_or_path, recipe.model.revision)
    tokens = tokens or recipe.model.max_length
    positions = getattr(config.get_text_config(), "max_position_embeddings", tokens)
    if tokens > positions:
        raise HallulibError(
            f"{tokens} tokens are more than the {positions} positions of this model.",
            "Shorten the sequences (model.max_length).",
        )
    rows = rows or getattr(recipe, plan.runs).batch_size
    may_share = recipe.dpo.prefix_sharing == "auto" and recipe.model.attention == "sdpa"
    shared = plan.runs in ("dpo", "reference") and may_share
    return StepShape(rows, tokens, min(completion or tokens // 2, tokens - 1), shared)


@lru_cache(maxsize=512)
def _trace_peak(
    recipe_json: str, plan: Strategy, shape: StepShape, replay: bool
) -> tuple[Terms, str, tuple[int, int, int] | None]:
    """Return what is alive at the peak, in which phase, and after a replay what a GPU allocates,
    reserves and needs. By plain values, so that the same question is answered once."""
    recipe = Recipe.model_validate_json(recipe_json)
    config = load_model_config(recipe.model.name_or_path, recipe.model.revision)
    trace = partial(trace_pass, recipe, plan, shape)
    try:
        depth, peaks = config.get_text_config().num_hidden_layers, None
        if not replay and depth > SHALLOW[-1] and has_equal_layers(config):
            shallow = [list_peaks(trace(cut_layers(config, n)), n) for n in SHALLOW]
            peaks = extend_peaks(shallow, depth)
        if peaks is not None:
            return *_pick_largest(peaks), None
        whole = trace(config)
    except HallulibError:
        raise
    except Exception as error:  # whatever a foreign architecture raises on tensors without values
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise HallulibError(
            f"A '{config.model_type}' model cannot be traced on tensors without values ({reason}).",
            "Its memory cannot be predicted; start the stage with --force and watch the card.",
        ) from error
    accumulates = plan.trains and getattr(recipe, plan.runs).gradient_accumulation > 1
    sizes = measure_requests(list_requests(whole, accumulates)) if replay else None
    return *list_terms(whole), sizes


def list_terms(trace: Trace) -> tuple[Terms, str]:
    """Return the bytes alive at the peak by term, and the phase in which it lies."""
    return _pick_largest(list_peaks(trace))


def _pick_largest(peaks: pd.DataFrame) -> tuple[Terms, str]:
    phase = peaks.sum().idxmax()
    return peaks[phase].to_dict(), phase


def list_peaks(trace: Trace, layers: int = 0) -> pd.DataFrame:
    """Return the bytes alive at the peak of every phase: a row for each term, a column a phase.

    What the forward pass made and holds at its end is an activation; the rest of what a pass makes
    is temporary. With `layers` the backward pass is cut where all layers but the first have their
    gradients: there the gradients of many layers may outgrow what else is alive.
    """
    live, parts = trace.list_live(), trace.list_phases()
    kept: set[int] = set()
    if "backward" in parts:
        start, end = parts["forward"]
        kept = trace.list_born(start, end) & trace.list_alive(end)
        start, end = parts["backward"]
        born = [at for at in range(start, end) if trace.events[at] > 0]
        grads = [at for at in born if trace.labels[trace.events[at] - 1] == "gradients"]
        if layers and grads:
            cut = grads[len(grads) - len(grads) // layers - 1] + 1
            parts |= {"backward": (start, cut), "backward, first layer": (cut, end)}
    peaks = {}
    for name, (start, end) in parts.items():
        if start == end:
            continue
        peaks[name] = dict.fromkeys(TERMS, 0)
        at = max(range(start, end), key=live.__getitem__)
        for storage in trace.list_alive(at + 1):
            unnamed = "activations" if storage in kept else "temporaries"
            peaks[name][trace.labels[storage] or unnamed] += trace.sizes[storage]
    return pd.DataFrame(peaks)


def extend_peaks(shallow: list[pd.DataFrame], depth: int) -> pd.DataFrame | None:
    """Return the peaks of a model of `depth` layers from those of two, three and four; None where
    these do not lie on a line, term by term."""
    two, three, four = shallow
    step = three - two
    if not (two.columns.equals(three.columns) and step.equals(four - three)):
        return None
    return two + (depth - SHALLOW[0]) * step
