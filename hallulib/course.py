"""Runs the numbered notebooks, in order, into a run folder; skips what is unchanged, resumes.

Each source in notebooks/ is executed with papermill into <run>/notebooks/, never in place, with
notebooks/ as the working directory (as in JupyterLab). Every notebook gets recipe, run_dir and
overrides; paths among them are passed on relative to the project, or to the home as ~.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from tqdm import tqdm

from hallulib.errors import DataError, HallulibError, RecipeError
from hallulib.files import (
    display_path,
    project_root,
    resolve_path,
    sha256_file,
    sha256_text,
    write_text_atomic,
)
from hallulib.notebook import check_parameters, execute
from hallulib.recipe import Recipe, find_recipe, load_recipe, recipe_names
from hallulib.report import read_costs, read_headline, write_report
from hallulib.run import Run, read_manifest
from hallulib.stages import STAGES, find_code, hash_code

GALLERY = "outputs/gallery"


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
) -> CourseResult:
    """Run the course, or the part of it that has changed, and print the result.

    `from_notebook` and `only` take a number or name ("04", "04_reference_cache"); `force` runs
    the selected notebooks and their stages again. Raises HallulibError when a cell fails and
    KeyboardInterrupt on Ctrl-C (the next call continues there), RecipeError before anything runs.
    """
    effective = load_recipe(recipe, overrides)
    run = Run.open(run_dir, effective)
    sources = find_notebooks(notebooks)
    chosen = select_notebooks(sources, from_notebook, only)
    parameters = {
        "recipe": recipe if recipe in recipe_names() else display_path(find_recipe(recipe)),
        "run_dir": display_path(run.root) if run_dir else "",
        "overrides": dict(overrides or {}),
    }
    for source in chosen:
        check_parameters(source, parameters)
    print(f"Recipe {effective.name}, run {display_path(run.root)}")
    for source in sources[: sources.index(chosen[0])]:
        for stage in stages_of(source):
            if not run.is_current(stage, effective):
                where = f"{stage} (notebook {source.stem})"
                print(f"Note: {where} is not up to date with this recipe and code.")
    result = CourseResult(run)
    for source in chosen:
        title = f"[{sources.index(source) + 1}/{len(sources)}] {source.stem}"
        if not force and is_done(run, effective, source, parameters):
            print(f"{title}: unchanged, skipped", flush=True)
            result.skipped.append(source.stem)
            continue
        for stage in stages_of(source) if force else []:
            run.forget(stage)
        run_notebook(run, source, parameters, title)
        result.executed.append(source.stem)
    print_result(run)
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
    wanted = from_notebook or only
    if from_notebook and only:
        raise RecipeError("--from and --only exclude each other.", "Give one of them.")
    if not wanted:
        return sources
    for index, source in enumerate(sources):
        if wanted.zfill(2) in (source.stem, source.stem[:2]):
            return sources[index:] if from_notebook else [source]
    names = ", ".join(source.stem for source in sources)
    raise RecipeError(f"There is no notebook '{wanted}'.", f"Use the number of: {names}.")


def stages_of(source: Path) -> list[str]:
    """The stages a notebook runs."""
    return [name for name, spec in STAGES.items() if spec.notebook == source.stem]


def describe_state(run: Run, source: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """All that decides what an executed notebook shows: it, its parameters, code, and results.

    Results are those of the stages up to this notebook, since a notebook may show earlier ones.
    """
    records = run.manifest["stages"]
    shown = [n for n, spec in STAGES.items() if spec.notebook <= source.stem and n in records]
    results = {name: records[name]["outputs"] for name in shown}
    return {
        "source_sha": sha256_file(source),
        "package_sha": hash_code(find_code(["**/*"])),
        "results_sha": sha256_text(json.dumps(results, sort_keys=True)),
        "parameters": parameters,
    }


def is_done(run: Run, recipe: Recipe, source: Path, parameters: dict[str, Any]) -> bool:
    """Whether the executed copy shows what this source, code, parameters and results would."""
    record = run.manifest["notebooks"].get(source.stem, {})
    if record.get("status") != "done" or not (run.root / "notebooks" / source.name).is_file():
        return False
    state = describe_state(run, source, parameters)
    unchanged = all(record.get(key) == value for key, value in state.items())
    return unchanged and all(run.is_current(stage, recipe) for stage in stages_of(source))


def run_notebook(run: Run, source: Path, parameters: dict[str, Any], title: str) -> None:
    """Execute one notebook and record how it went; raises unless it reached its end."""
    target = run.root / "notebooks" / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    last = run.manifest["notebooks"].get(source.stem, {}).get("expected_seconds")
    state = describe_state(run, source, parameters) | {"expected_seconds": last}
    unknown = {"status": "running", "wall_seconds": 0.0, "peak_memory_bytes": 0}
    run.update(lambda manifest: manifest["notebooks"].update({source.stem: state | unknown}))
    print(f"{title}: last time {tqdm.format_interval(last)}" if last else f"{title}:", flush=True)
    result = execute(source, target, parameters, title)
    # Sources count as they were at the start, results as they are at the end.
    state["results_sha"] = describe_state(run, source, parameters)["results_sha"]
    if result["status"] == "done":
        state["expected_seconds"] = result["wall_seconds"]
    run.update(lambda manifest: manifest["notebooks"].update({source.stem: state | result}))
    seconds, peak = result["wall_seconds"], result["peak_memory_bytes"] / 2**30
    spent = f"{tqdm.format_interval(seconds)}, peak {peak:.2f} GiB"
    print(f"{title}: {result['status']} in {spent}", flush=True)
    if result["status"] == "interrupted":
        raise KeyboardInterrupt
    if result["status"] == "failed":
        print(f"\n{result['error']}", flush=True)
        raise HallulibError(
            f"Notebook {source.stem} stopped in cell '{result['cell']}', with the words above.",
            f"The same command continues; what has run is kept, also in {display_path(target)}.",
        )


def print_result(run: Run) -> None:
    """The headline, what each notebook cost, and where to read on."""
    report, headline = write_report(run), read_headline(run.root)
    if not headline.empty:
        print(f"\nHeld-out notes, measured:\n{headline.to_string()}")
    print(f"\n{read_costs(run.root).to_string()}")
    print(f"\nReport:    {display_path(report)}")
    print(f"Notebooks: {display_path(run.root / 'notebooks')}")


def publish_gallery(
    run_root: Path, notebooks: str | Path = "notebooks", target: str | Path = GALLERY
) -> list[Path]:
    """Copy a run's executed notebooks to the gallery and stamp each; returns the copies.

    Raises DataError, before anything is written, unless every notebook ran to its end from its
    present source and no copy names a folder of this machine.
    """
    manifest, copies = read_manifest(run_root), {}
    versions = next(iter(manifest["stages"].values()), {}).get("versions", {})
    for source in find_notebooks(notebooks):
        record = manifest["notebooks"].get(source.stem, {})
        if record.get("status") != "done" or record.get("source_sha") != sha256_file(source):
            raise _refuse(source.stem, "has not run to its end from its present source")
        notebook = nbformat.read(run_root / "notebooks" / source.name, as_version=4)
        stamp = ("source_sha", "parameters", "wall_seconds", "peak_memory_bytes")
        notebook.metadata["hallulib"] = {key: record[key] for key in stamp} | {
            "recipe": manifest["recipe"]["name"],
            "versions": versions,
        }
        text = nbformat.writes(notebook)
        if str(Path.home()) in text or str(project_root()) in text:
            raise _refuse(source.stem, "prints a path of this machine")
        copies[resolve_path(target) / source.name] = text
    for path, text in copies.items():
        write_text_atomic(path, text + "\n")
    return list(copies)


def _refuse(name: str, why: str) -> DataError:
    return DataError(
        f"The gallery cannot take notebook {name}: it {why}.",
        "Run `python -m hallulib course` first; the gallery is unchanged.",
    )
