"""A run whose stages write small text files, so that the provenance chain can be tested alone."""

from pathlib import Path

from hallulib.recipe import Recipe, load_recipe
from hallulib.run import Run
from hallulib.stages import STAGES


def change(**overrides) -> Recipe:
    """The default recipe with dotted overrides: change(dpo__beta=0.2)."""
    return load_recipe("tiny-cpu", {key.replace("__", "."): v for key, v in overrides.items()})


def write_outputs(run: Run, stage: str, text: str = "x") -> None:
    """Write every output of a stage: a file, or a folder with one file where it has no suffix."""
    for output in STAGES[stage].outputs:
        path = run.path(output) if Path(output).suffix else run.path(output) / "weights.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{output} {text}")


def finish(run: Run, recipe: Recipe, *stages: str, text: str = "x") -> None:
    """Write and record stages as their functions would."""
    for stage in stages:
        write_outputs(run, stage, text)
        measured = {"wall_seconds": 1.0, "peak_memory_bytes": 1, "device": "cpu"}
        run.record(stage, recipe, measured, {})
