"""The trace of a deep model from those of shallow ones: equal layers do the same again.

Traces of two, three and four layers are taken. What three have beyond two is the unit that a layer
adds; made twice it must give four, event by event, or the whole model is traced instead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from hallulib.tracker import Trace

SHALLOW = (2, 3, 4)
WINDOW = 4  # events that must agree after an insertion before it is believed
TRIES = 2000  # alignments that are looked at before the whole model is traced instead
# Phase of birth, bytes, label: storages of a kind are alike. Bytes that grow with the layers, as a
# list of one number per tensor does, are (of two layers, of each further one).
Kind = tuple[str, int | tuple[int, int], str]
# (kind, None) is an allocation, (kind, -1) the release of the newest that lives of its kind, and
# (kind, 0) that of the oldest.
Event = tuple[Kind, int | None]
Insertion = tuple[int, list[Event]]  # where, and what


@dataclass(frozen=True)
class Unit:
    """What each further layer adds at `place`. Its releases may reach `steps` further among the
    living from copy to copy (int8 frees things behind what stays), counted from the last copy or
    from the first."""

    place: int
    events: list[Event]
    steps: list[int]
    from_last: bool

    def repeat(self, times: int) -> list[Event]:
        """Return the events of so many layers."""
        found: list[Event] = []
        for copy in range(times):
            far = times - 1 - copy if self.from_last else copy
            for (kind, rank), step in zip(self.events, self.steps, strict=True):
                found.append((kind, rank if rank is None else rank + far * step))
        return found


@dataclass(frozen=True)
class Phase:
    """The events of a phase up to its last allocation, and what is released after it by kind: the
    order in which a graph is taken down says nothing."""

    name: str
    events: list[Event]
    freed: Counter[Kind]


def trace_by_layers(trace: Callable[[PretrainedConfig], Trace], config: PretrainedConfig) -> Trace:
    """Return what `trace(config)` would, tracing a few layers where all layers are equal."""
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    extended = None
    if depth > sum(SHALLOW) and has_equal_layers(config):
        try:
            traces = [trace(cut_layers(config, count)) for count in SHALLOW]
            extended = extend_traces(traces, depth - SHALLOW[0])
        except Exception:  # whatever a foreign architecture raises when cut; whole it may run
            extended = None
    return trace(config) if extended is None else extended


def extend_traces(traces: list[Trace], further: int) -> Trace | None:
    """Return the trace with so many layers beyond two, from those of two, three and four; None
    where these do not tell it."""
    near, new = (
        zip(*name_growing([encode_trace(trace, by) for trace in traces]), strict=True)
        for by in (_nearest, _newest)
    )
    whole: list[Phase] = []
    for by_nearest, by_newest in zip(near, new, strict=True):
        ways = ((by_nearest, False), (by_newest, False), (by_newest, True))
        extended = (extend_phase(*three, further, slides) for three, slides in ways)
        phase = next((found for found in extended if found is not None), None)
        if phase is None:
            return None
        whole.append(phase)
    return decode_trace(whole, further)


def extend_phase(
    two: Phase, three: Phase, four: Phase, further: int, slides: bool = False
) -> Phase | None:
    """Return the phase with so many layers beyond two; None where no unit explains three layers
    and, made twice, four. With `slides` a unit's releases may reach further from copy to copy."""
    kinds = two.freed | three.freed | four.freed
    step = {kind: three.freed[kind] - two.freed[kind] for kind in kinds}
    if any(four.freed[kind] - three.freed[kind] != step[kind] for kind in kinds):
        return None
    for insertions in islice(find_insertions(two.events, three.events), TRIES):
        units = find_units(two.events, insertions, four.events)
        if units is not None and (slides or not any(any(unit.steps) for unit in units)):
            freed = Counter({kind: two.freed[kind] + further * step[kind] for kind in kinds})
            return Phase(two.name, insert_units(two.events, units, further), freed)
    return None


def find_units(
    two: list[Event], insertions: list[Insertion], four: list[Event]
) -> list[Unit] | None:
    """Return the units whose second copy stands in `four`; None where they do not explain it."""
    units, shift = [], 0
    for place, events in insertions:
        at, size = place + shift, len(events)
        first, second = four[at : at + size], four[at + size : at + 2 * size]
        shift += 2 * size
        near, far = (second, first) if second == events else (first, second)
        steps = [
            (b or 0) - (a or 0) if kind == other and (a is None) == (b is None) else None
            for (kind, a), (other, b) in zip(near, far, strict=False)
        ]
        if near != events or len(steps) != size or None in steps:
            return None
        units.append(Unit(place, events, steps, near is second))
    return units if insert_units(two, units, 2) == four else None


def has_equal_layers(config: PretrainedConfig) -> bool:
    """Whether all layers look alike: the same modules of the same shapes and the same settings."""
    text = config.get_text_config()
    depth = text.num_hidden_layers
    if any(len(set(map(str, v))) > 1 for v in _list_per_layer(text, depth).values()):
        return False
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(config))
    except ValueError:
        return False  # whoever traces it will say what it is
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return len(stacks) == 1 and len({_describe(layer) for layer in stacks[0]}) == 1


def cut_layers(config: PretrainedConfig, count: int) -> PretrainedConfig:
    """Return the configuration of the same model with its first `count` layers only."""
    cut = deepcopy(config)
    text = cut.get_text_config()
    lists = _list_per_layer(text, text.num_hidden_layers)
    text.num_hidden_layers = count
    for name, values in lists.items():
        setattr(text, name, list(values[:count]))
    return cut


def _list_per_layer(text: PretrainedConfig, depth: int) -> dict[str, list]:
    values = text.to_dict().items()
    return {name: v for name, v in values if isinstance(v, list) and len(v) == depth}


def _describe(layer: nn.Module) -> str:
    """Modules, shapes, and plain attributes such as a sliding window; the layer's number aside."""
    parts = [repr(layer)]
    for module in layer.modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
        parts.append(str({k: v for k, v in plain.items() if k != "layer_idx"}))
    parts += [f"{name} {tuple(value.shape)}" for name, value in layer.named_parameters()]
    return "\n".join(parts)


def encode_trace(trace: Trace, choose: Callable[[int, int], int]) -> list[Phase]:
    """Return the phases with their events, written so that equal layers read equally.

    `choose(place, living)` says which of the living of its kind a released storage is.
    """
    living: dict[Kind, list[int]] = defaultdict(list)
    phases = []
    for name, start, end in trace.list_phases():
        events: list[Event] = []
        for event in trace.events[start:end]:
            storage = abs(event) - 1
            kind = (trace.phases[storage], trace.sizes[storage], trace.labels[storage])
            alive = living[kind]
            if event > 0:
                alive.append(storage)
                events.append((kind, None))
                continue
            place = alive.index(storage)
            events.append((kind, choose(place, len(alive))))
            del alive[place]
        last = max((i for i, (_, rank) in enumerate(events, 1) if rank is None), default=0)
        phases.append(Phase(name, events[:last], Counter(kind for kind, _ in events[last:])))
    return phases


def _nearest(place: int, living: int) -> int:
    """Counted from the nearer end: lists are freed from one, graphs taken down from the other."""
    return place if 2 * place < living - 1 else place - living


def _newest(place: int, living: int) -> int:
    return place - living


def name_growing(found: list[list[Phase]]) -> list[list[Phase]]:
    """Return the three with the kinds that no two of them share, whose bytes grow by as much from
    one to the next, called alike."""
    kinds = [
        {kind for p in phases for kind in [*(kind for kind, _ in p.events), *p.freed]}
        for phases in found
    ]
    own = [mine.difference(*(other for other in kinds if other is not mine)) for mine in kinds]
    names: dict[Kind, Kind] = {}
    if len({len(mine) for mine in own}) == 1:
        for few, some, more in zip(*map(sorted, own), strict=True):
            step = some[1] - few[1]
            if more[1] - some[1] == step:
                names |= dict.fromkeys((few, some, more), (few[0], (few[1], step), few[2]))

    def rename(phase: Phase) -> Phase:
        events = [(names.get(kind, kind), rank) for kind, rank in phase.events]
        freed = Counter({names.get(kind, kind): n for kind, n in phase.freed.items()})
        return Phase(phase.name, events, freed)

    return [[rename(phase) for phase in phases] for phases in found]


def decode_trace(phases: list[Phase], further: int = 0) -> Trace:
    """Return the trace that :func:`encode_trace` reads as `phases`, with what grows as it is with
    so many `further` layers."""
    trace, living = Trace(), defaultdict(list)
    for part in phases:
        trace.marks.append((len(trace.events), part.name))
        freed = [(kind, -1) for kind, count in part.freed.items() for _ in range(count)]
        for kind, rank in [*part.events, *freed]:
            if rank is None:
                phase, size, label = kind
                living[kind].append(len(trace.sizes))
                trace.phases.append(phase)
                trace.sizes.append(size if isinstance(size, int) else size[0] + further * size[1])
                trace.labels.append(label)
                trace.events.append(len(trace.sizes))
            else:
                trace.events.append(-living[kind].pop(rank) - 1)
    return trace


def find_insertions(fewer: list[Event], more: list[Event]) -> Iterator[list[Insertion]]:
    """Yield the ways to make `more` of `fewer` by insertions, as (place in `fewer`, events).

    Where the sequences part, the shortest insertion after which they agree for a while is tried
    first.
    """
    here = _count_equal(fewer, more, 0, 0)
    branches: list[tuple[int, int, list[Insertion]]] = [(here, here, [])]
    while branches:
        i, j, found = branches.pop()
        spare = len(more) - j - (len(fewer) - i)
        if i == len(fewer):
            yield [*found, (i, more[j:])] if spare else found
            continue
        for length in range(spare, 0, -1):  # pushed last is tried first
            agree = _count_equal(fewer, more, i, j + length)
            if agree >= min(WINDOW, len(fewer) - i):
                insertion = (i, more[j : j + length])
                branches.append((i + agree, j + length + agree, [*found, insertion]))


def _count_equal(fewer: list[Event], more: list[Event], i: int, j: int) -> int:
    """Return how many events agree from `i` and `j` on."""
    pairs = zip(islice(fewer, i, None), islice(more, j, None), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(fewer) - i, len(more) - j))


def insert_units(events: list[Event], units: list[Unit], times: int) -> list[Event]:
    """Return the events with what so many layers add."""
    whole, start = [], 0
    for unit in units:
        whole += events[start : unit.place] + unit.repeat(times)
        start = unit.place
    return whole + events[start:]
