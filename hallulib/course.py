"""Runs the numbered notebooks, in order, into a run folder; skips what is unchanged, resumes.

Each source in notebooks/ is executed with papermill into <run>/notebooks/, never in place, with
notebooks/ as the working directory (as in JupyterLab). Every notebook gets recipe, run_dir and
overrides; paths among them are passed on relative to the project, or to the home as ~.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from hallulib.errors import HallulibError, RecipeError
from hallulib.files import display_path, resolve_path, sha256_file, sha256_text, storage_guard
from hallulib.notebook import (
    Execution,
    Progress,
    check_parameters,
    count_cells,
    execute,
    format_seconds,
)
from hallulib.provenance import PACKAGE, STAGES, hash_sources
from hallulib.recipe import Recipe, find_recipe, load_recipe, recipe_names
from hallulib.report import cost_table, format_gib, headline_table, read_headline, write_report
from hallulib.run import Run


@dataclass
class CourseResult:
    """What one call did: the run, and the names of the notebooks executed and skipped."""

    run: Run
    executed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def run_course(
    recipe: str = "tiny-cpu",
    run_dir: str | Path = "",
    overrides: Mapping[str, Any] | None = None,
    *,
    from_notebook: str = "",
    only: str = "",
    force: bool = False,
    notebooks: str | Path = "notebooks",
    stream: TextIO | None = None,
) -> CourseResult:
    """Run the course, or the part of it that has changed, and print the result.

    `from_notebook` and `only` take a number or name ("04", "04_reference_cache"); `force` runs
    the selected notebooks and their stages again. Raises HallulibError when a cell fails (the
    next call continues there), KeyboardInterrupt on Ctrl-C (likewise), RecipeError,
    RecipeError, HallulibError, HallulibError or HallulibError before anything has run.
    """
    effective = load_recipe(recipe, overrides)
    run = Run.open(run_dir, effective)
    sources = find_notebooks(notebooks)
    chosen = select_notebooks(sources, from_notebook, only)
    values = {
        "recipe": recipe if recipe in recipe_names() else display_path(find_recipe(recipe)),
        "run_dir": display_path(run.root) if run_dir else "",
        "overrides": dict(overrides or {}),
    }
    parameters = {source: check_parameters(source, values) for source in chosen}
    progress = Progress(stream)
    progress.say(f"Recipe {effective.name}, run {display_path(run.root)}")
    _mention_stale(run, effective, sources, chosen, progress)
    result = CourseResult(run)
    for source in chosen:
        title = f"[{sources.index(source) + 1}/{len(sources)}] {source.stem}"
        if not force and _is_done(run, effective, source, parameters[source]):
            progress.say(f"{title}: unchanged, skipped")
            result.skipped.append(source.stem)
            continue
        if force:
            for stage in stages_of(source):
                run.forget(stage)
        _run_one(run, source, parameters[source], title, progress)
        result.executed.append(source.stem)
    _print_result(run, progress)
    return result


def find_notebooks(folder: str | Path = "notebooks") -> list[Path]:
    """The numbered notebooks (NN_name.ipynb) in order. Raises RecipeError if there are none."""
    found = sorted(resolve_path(folder).glob("[0-9][0-9]_*.ipynb"))
    if not found:
        where = display_path(resolve_path(folder))
        raise RecipeError(f"There are no notebooks in {where}.", "Give the course's own folder.")
    return found


def select_notebooks(sources: list[Path], from_notebook: str, only: str) -> list[Path]:
    """The notebooks from `from_notebook` on, or `only` one; all when both are empty."""

    def find(wanted: str) -> int:
        number = wanted.zfill(2) if wanted.isdigit() else wanted
        for index, source in enumerate(sources):
            if source.stem == number or source.stem.split("_")[0] == number:
                return index
        names = ", ".join(source.stem for source in sources)
        raise RecipeError(f"There is no notebook '{wanted}'.", f"Use the number of: {names}.")

    if from_notebook and only:
        raise RecipeError("--from and --only exclude each other.", "Give one of them.")
    if only:
        return [sources[find(only)]]
    return sources[find(from_notebook) :] if from_notebook else sources


def stages_of(source: Path) -> list[str]:
    """The stages a notebook runs."""
    return [name for name, spec in STAGES.items() if spec.notebook == source.stem]


def _state(run: Run, source: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """All that decides what an executed notebook shows: it, its parameters, code, and results.

    Results are those of the stages up to this notebook, since a notebook may show earlier ones.
    """
    return {
        "source_sha": sha256_file(source),
        "package_sha": hash_sources(sorted(PACKAGE.rglob("*.py"))),
        "results_sha": _hash_results(run, source),
        "parameters": parameters,
    }


def _hash_results(run: Run, source: Path) -> str:
    records = run.manifest["stages"]
    names = [name for name, spec in STAGES.items() if spec.notebook <= source.stem]
    results = {name: records[name]["outputs"] for name in names if name in records}
    return sha256_text(json.dumps(results, sort_keys=True))


def _is_done(run: Run, recipe: Recipe, source: Path, parameters: dict[str, Any]) -> bool:
    record = run.manifest["notebooks"].get(source.stem, {})
    if record.get("status") != "done" or not executed_copy(run, source).is_file():
        return False
    now = _state(run, source, parameters)
    unchanged = all(record.get(key) == value for key, value in now.items())
    return unchanged and all(run.is_current(stage, recipe) for stage in stages_of(source))


def executed_copy(run: Run, source: Path) -> Path:
    """Where the executed copy of a notebook goes."""
    return run.root / "notebooks" / source.name


def _run_one(
    run: Run, source: Path, parameters: dict[str, Any], title: str, progress: Progress
) -> None:
    """Execute one notebook and record how it went; raises unless it reached its end."""
    before = run.manifest["notebooks"].get(source.stem, {})
    target = executed_copy(run, source)
    cells = count_cells(source)
    state = _state(run, source, parameters)
    _record(run, source, state, Execution())
    progress.start(title, cells, before.get("expected_seconds"))
    with storage_guard(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            execution = execute(source, target, parameters, progress)
        except BaseException:
            progress.finish("stopped")
            raise
    # Sources count as they were at the start, results as they are at the end.
    _record(run, source, state | {"results_sha": _hash_results(run, source)}, execution)
    time, peak = format_seconds(execution.wall_seconds), format_gib(execution.peak_memory_bytes)
    progress.finish(f"{execution.status} in {time}, peak {peak}")
    if execution.status == "interrupted":
        raise KeyboardInterrupt
    if execution.status == "failed":
        raise _explain_failure(source, target, execution)


def _record(run: Run, source: Path, state: dict[str, Any], execution: Execution) -> None:
    """Write an execution into the manifest; the time of a whole one is the next estimate."""

    def change(manifest: dict[str, Any]) -> None:
        before = manifest["notebooks"].get(source.stem, {})
        expected = before.get("expected_seconds")
        if execution.status == "done":
            expected = execution.wall_seconds
        manifest["notebooks"][source.stem] = (
            state | asdict(execution) | {"expected_seconds": expected}
        )

    run.update(change)


def _explain_failure(source: Path, target: Path, execution: Execution) -> HallulibError:
    """Name notebook, cell and cause; a cause of ours brings its own next step."""
    cause, _, advice = execution.error.partition("\nNext: ")
    kept = f"The executed copy is {display_path(target)}; what is finished is kept."
    again = "Run the same command again: it continues with this notebook."
    return HallulibError(
        f"Notebook {source.stem} stopped in cell '{execution.cell}'.\n{cause.strip()}",
        "\n".join(part for part in (advice.strip(), kept, again) if part),
    )


def _mention_stale(
    run: Run, recipe: Recipe, sources: list[Path], chosen: list[Path], progress: Progress
) -> None:
    """Say which earlier notebooks, left out by --from or --only, no longer match this recipe."""
    for source in sources[: sources.index(chosen[0])]:
        stale = [name for name in stages_of(source) if not run.is_current(name, recipe)]
        if stale:
            made = f"{', '.join(stale)} (notebook {source.stem})"
            progress.say(f"Note: {made} is not up to date with this recipe and code.")


def _print_result(run: Run, progress: Progress) -> None:
    """The headline, what each notebook cost, and where to read on."""
    report = write_report(run)
    rows = read_headline(run.root)
    if rows:
        progress.say(f"\nHeld-out notes, measured:\n{headline_table(rows)}")
    progress.say(f"\n{cost_table(run.manifest)}")
    progress.say(f"\nReport:    {display_path(report)}")
    progress.say(f"Notebooks: {display_path(run.root / 'notebooks')}")
