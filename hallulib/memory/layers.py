"""The trace of a deep model from those of shallow ones: equal layers do the same again.

Traces of two, three and four layers are taken. What three have beyond two is the unit that a layer
adds; made twice it must give four, event by event, or the whole model is traced instead (as it is
for training in int8, whose layers keep more than they should and free it in no simple order).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
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
Phases = list[tuple[str, list[Event]]]
Unit = tuple[int, list[Event]]  # where it is inserted, and what


def trace_by_layers(trace: Callable[[PretrainedConfig], Trace], config: PretrainedConfig) -> Trace:
    """Return what `trace(config)` would, tracing a few layers where all layers are equal."""
    depth = config.get_text_config().num_hidden_layers
    if depth <= sum(SHALLOW) or not has_equal_layers(config):
        return trace(config)
    traces, further = [trace(cut_layers(config, n)) for n in SHALLOW], depth - SHALLOW[0]
    readings = [
        name_growing([encode_trace(shallow, by) for shallow in traces])
        for by in (_nearest, _newest)
    ]
    whole: Phases = []
    for number, (name, _) in enumerate(readings[0][0]):
        threes = ([phases[number][1] for phases in reading] for reading in readings)
        extended = (extend_events(*three, further) for three in threes)
        events = next((found for found in extended if found is not None), None)
        if events is None:
            return trace(config)
        whole.append((name, events))
    return decode_trace(whole, further)


def extend_events(
    two: list[Event], three: list[Event], four: list[Event], further: int
) -> list[Event] | None:
    """Return the events of a phase with so many layers beyond two; None where no unit explains
    three layers and, made twice, four."""
    for units in islice(find_units(two, three), TRIES):
        if insert_units(two, units, 2) == four:
            return insert_units(two, units, further)
    return None


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


def encode_trace(trace: Trace, choose: Callable[[int, int], int]) -> Phases:
    """Return the phases with their events, written so that equal layers read equally.

    `choose(place, living)` says which of the living of its kind a released storage is.
    """
    living: dict[Kind, list[int]] = defaultdict(list)
    phases: Phases = []
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
        phases.append((name, events))
    return phases


def _nearest(place: int, living: int) -> int:
    """Counted from the nearer end: lists are freed from one, graphs taken down from the other."""
    return place if 2 * place < living - 1 else place - living


def _newest(place: int, living: int) -> int:
    return place - living


def name_growing(found: list[Phases]) -> list[Phases]:
    """Return the three with the kinds that no two of them share, whose bytes grow by as much from
    one to the next, called alike."""
    kinds = [{event[0] for _, events in phases for event in events} for phases in found]
    own = [mine.difference(*(other for other in kinds if other is not mine)) for mine in kinds]
    names: dict[Kind, Kind] = {}
    if len({len(mine) for mine in own}) == 1:
        for few, some, more in zip(*map(sorted, own), strict=True):
            step = some[1] - few[1]
            if more[1] - some[1] == step:
                names |= dict.fromkeys((few, some, more), (few[0], (few[1], step), few[2]))
    return [
        [
            (name, [(names.get(kind, kind), rank) for kind, rank in events])
            for name, events in phases
        ]
        for phases in found
    ]


def decode_trace(phases: Phases, further: int = 0) -> Trace:
    """Return the trace that :func:`encode_trace` reads as `phases`, with what grows as it is with
    so many `further` layers."""
    trace, living = Trace(), defaultdict(list)
    for name, events in phases:
        trace.marks.append((len(trace.events), name))
        for kind, rank in events:
            if rank is None:
                phase, size, label = kind
                living[kind].append(len(trace.sizes))
                trace.phases.append(phase)
                trace.sizes.append(size if isinstance(size, int) else size[0] + further * size[1])
                trace.labels.append(label)
                trace.events.append(len(trace.sizes))
            else:
                storage = living[kind].pop(rank)
                trace.events.append(-storage - 1)
    return trace


def find_units(fewer: list[Event], more: list[Event]) -> Iterator[list[Unit]]:
    """Yield the ways to make `more` of `fewer` by insertions, as (place in `fewer`, events).

    Where the sequences part, the shortest insertion after which they agree for a while is tried
    first.
    """
    here = _count_equal(fewer, more, 0, 0)
    branches: list[tuple[int, int, list[Unit]]] = [(here, here, [])]
    while branches:
        i, j, units = branches.pop()
        spare = len(more) - j - (len(fewer) - i)
        if i == len(fewer):
            yield [*units, (i, more[j:])] if spare else units
            continue
        for length in range(spare, 0, -1):  # pushed last is tried first
            agree = _count_equal(fewer, more, i, j + length)
            if agree >= min(WINDOW, len(fewer) - i):
                unit = (i, more[j : j + length])
                branches.append((i + agree, j + length + agree, [*units, unit]))


def _count_equal(fewer: list[Event], more: list[Event], i: int, j: int) -> int:
    """Return how many events agree from `i` and `j` on."""
    pairs = zip(islice(fewer, i, None), islice(more, j, None), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(fewer) - i, len(more) - j))


def insert_units(events: list[Event], units: list[Unit], times: int) -> list[Event]:
    """Return the events with each insertion made `times` times."""
    whole, start = [], 0
    for place, unit in units:
        whole += events[start:place] + unit * times
        start = place
    return whole + events[start:]
