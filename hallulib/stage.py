"""The contract of a stage: reuse what is unchanged, check inputs, measure, record last."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from hallulib.files import display_path, storage_guard
from hallulib.meter import measure
from hallulib.processes import is_main_process, speak_once, wait_for_all
from hallulib.recipe import Recipe
from hallulib.run import STAGES, Run

Result = TypeVar("Result")


def stage(
    name: str, load: Callable[[Run], Result], parallel: bool = False
) -> Callable[..., Callable[..., Result]]:
    """Make `body(recipe, run) -> Result` a stage.

    If nothing that decides the stage has changed, the body is not run: `load(run)` reads its
    result back. Otherwise every input is required (MissingArtifact, MissingArtifact), the body is
    measured, and its outputs are recorded. Nothing is recorded when the body raises, so the next
    call starts it again, from its checkpoints if it keeps any.

    Under `accelerate launch` every process runs a `parallel` body, and the main one alone any
    other; only the main process records.
    """

    def decorate(body: Callable[[Recipe, Run], Result]) -> Callable[[Recipe, Run], Result]:
        @functools.wraps(body)
        def run_stage(recipe: Recipe, run: Run) -> Result:
            with speak_once():
                if run.is_current(name, recipe):
                    outputs = ", ".join(STAGES[name].outputs)
                    print(f"{name}: unchanged, reusing {outputs} in {display_path(run.root)}")
                    wait_for_all()  # nobody may write before everybody has looked
                    return load(run)
                for artifact in STAGES[name].inputs:
                    run.require(artifact)
                key = run.stage_key(name, recipe)
                wait_for_all()
                result = None
                if parallel or is_main_process():
                    result = _run_measured(name, body, recipe, run, key)
                wait_for_all()
                return load(run) if result is None else result

        return run_stage

    return decorate


def _run_measured(
    name: str, body: Callable[[Recipe, Run], Result], recipe: Recipe, run: Run, key: str
) -> Result:
    with storage_guard(run.root):
        with measure(name) as meter:
            result = body(recipe, run)
        measured = {
            "key": key,
            "wall_seconds": meter.wall_seconds,
            "peak_memory_bytes": meter.peak_memory_bytes,
            "rss_before_bytes": meter.rss_before_bytes,
            "device": meter.device,
            "memory": {
                "allocated": meter.peak_cuda_bytes or meter.peak_mps_bytes,
                "reserved": meter.peak_cuda_reserved_bytes,
            },
        }
        if is_main_process():
            run.record(name, recipe, measured, _read_notes(result))
    return result


def _read_notes(result: Any) -> dict[str, Any]:
    """What a stage wants in the manifest: the `notes` dict of its result, if it has one."""
    return dict(getattr(result, "notes", None) or {})
