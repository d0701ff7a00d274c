"""The contract of a stage: reuse what is unchanged, check inputs, measure, record last."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from hallulib.errors import storage_guard
from hallulib.meter import measure
from hallulib.paths import display_path
from hallulib.recipe import Recipe
from hallulib.run import STAGES, Run

Result = TypeVar("Result")


def stage(name: str, load: Callable[[Run], Result]) -> Callable[..., Callable[..., Result]]:
    """Make `body(recipe, run) -> Result` a stage.

    If nothing that decides the stage has changed, the body is not run: `load(run)` reads its
    result back. Otherwise every input is required (MissingArtifact, StaleArtifact), the body is
    measured, and its outputs are recorded. Nothing is recorded when the body raises, so the next
    call starts it again, from its checkpoints if it keeps any.
    """

    def decorate(body: Callable[[Recipe, Run], Result]) -> Callable[[Recipe, Run], Result]:
        @functools.wraps(body)
        def run_stage(recipe: Recipe, run: Run) -> Result:
            if run.is_current(name, recipe):
                outputs = ", ".join(STAGES[name].outputs)
                print(f"{name}: unchanged, reusing {outputs} in {display_path(run.root)}")
                return load(run)
            for artifact in STAGES[name].inputs:
                run.require(artifact)
            key = run.stage_key(name, recipe)
            with storage_guard(run.root):
                with measure(name) as meter:
                    result = body(recipe, run)
                measured = {
                    "key": key,
                    "wall_seconds": meter.wall_seconds,
                    "peak_memory_bytes": meter.peak_memory_bytes,
                    "rss_before_bytes": meter.rss_before_bytes,
                    "device": meter.device,
                }
                run.record(name, recipe, measured, _read_notes(result))
            return result

        return run_stage

    return decorate


def _read_notes(result: Any) -> dict[str, Any]:
    """What a stage wants in the manifest: the `notes` dict of its result, if it has one."""
    return dict(getattr(result, "notes", None) or {})
