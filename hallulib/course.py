"""Runs the numbered notebooks, in order, into a run folder; skips what is unchanged, resumes.

Every notebook gets recipe, run_dir and overrides; paths among them are passed on relative to the
project, or to the home as ~.
"""

import ast
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from hallulib.errors import DataError, HallulibError, RecipeError
from hallulib.files import display_path, project_root, resolve_path, sha256_file, write_text_atomic
from hallulib.meter import sample_peak
from hallulib.recipe import load_recipe, name_nearest, recipe_names
from hallulib.report import read_costs, read_headline, write_report
from hallulib.run import Run
from hallulib.stages import STAGES, hash_code

GALLERY = "outputs/gallery"


def run_course(
    recipe: str = "tiny-cpu",
    run_dir: str | Path = "",
    overrides: Mapping[str, Any] | None = None,
    *,
    from_notebook: str = "",
    only: str = "",
    force: bool = False,
    notebooks: str | Path = "notebooks",
) -> list[str]:
    """Run the course, or the part of it that has changed, and print the result.

    `from_notebook` and `only` take a number or name ("04", "04_reference_cache"); `force` runs
    the selected notebooks and their stages again. Returns the names of the notebooks executed.
    Raises HallulibError when a cell fails and KeyboardInterrupt on Ctrl-C (the next call continues
    there), RecipeError before anything runs.
    """
    effective = load_recipe(recipe, overrides)
    run = Run.open(run_dir, effective)
    sources = find_notebooks(notebooks)
    chosen = select_notebooks(sources, from_notebook, only)
    parameters = {
        "recipe": recipe if recipe in recipe_names() else display_path(resolve_path(recipe)),
        "run_dir": display_path(run.root) if run_dir else "",
        "overrides": dict(overrides or {}),
    }
    for source in chosen:
        check_parameters(source, parameters)
    print(f"Recipe {effective.name}, run {display_path(run.root)}")
    executed = []
    for source in chosen:
        title = f"[{sources.index(source) + 1}/{len(sources)}] {source.stem}"
        stages = [name for name, spec in STAGES.items() if spec.notebook == source.stem]
        current = all(run.is_current(stage, effective) for stage in stages)
        if current and not force and is_done(run, source, parameters):
            print(f"{title}: unchanged, skipped", flush=True)
            continue
        for stage in stages if force else ():
            run.forget(stage)
        run_notebook(run, source, parameters, title)
        executed.append(source.stem)
    headline = read_headline(run)
    if not headline.empty:
        print(f"\nHeld-out notes, measured:\n{headline.to_string()}")
    print(f"\n{read_costs(run).to_string()}")
    print(f"\nReport:    {display_path(write_report(run))}")
    print(f"Notebooks: {display_path(run.path('notebooks'))}")
    return executed


def find_notebooks(folder: str | Path = "notebooks") -> list[Path]:
    """The numbered notebooks (NN_name.ipynb) in order."""
    return sorted(resolve_path(folder).glob("[0-9][0-9]_*.ipynb"))


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


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Raise RecipeError unless the notebook declares each parameter, with a literal of its type
    (papermill only warns of an unknown name, and passes on what it is given)."""
    declared = papermill.inspect_notebook(str(notebook))
    for name, value in parameters.items():
        try:
            if type(ast.literal_eval(declared[name]["default"])) is type(value):
                continue
            what = f"declares '{name}' as {declared[name]['default']}"
        except KeyError:
            what = f"has no parameter '{name}'." + name_nearest(name, list(declared))
        except (ValueError, SyntaxError):
            what = f"declares '{name}' by {declared[name]['default']}, which is no literal"
        # papermill overlooks a line with two equals signs, even if one is in the comment.
        raise RecipeError(
            f"Notebook {notebook.stem} {what}",
            f"Write a line {name} = <{type(value).__name__}>, without a second '=', in its "
            "parameters cell.",
        )


def is_done(run: Run, source: Path, parameters: dict[str, Any]) -> bool:
    """Whether the executed copy shows what this source, code, parameters and results would."""
    record = run.manifest["notebooks"].get(source.stem, {})
    state = describe_state(run, source, parameters) | {"status": "done"}
    return state.items() <= record.items() and run.path(f"notebooks/{source.name}").is_file()


def describe_state(run: Run, source: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """All that decides what an executed notebook shows: it, its parameters, code, and the results
    of the stages up to it."""
    records = run.manifest["stages"]
    shown = [n for n, spec in STAGES.items() if spec.notebook <= source.stem and n in records]
    results = {name: records[name]["outputs"] for name in shown}
    shas = {"source_sha": sha256_file(source), "package_sha": hash_code(["**/*"])}
    return shas | {"results": results, "parameters": parameters}


def run_notebook(run: Run, source: Path, parameters: dict[str, Any], title: str) -> None:
    """Execute one notebook and record how it went; raises unless it reached its end."""
    target = run.path(f"notebooks/{source.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    run.update(lambda manifest: manifest["notebooks"].pop(source.stem, None))
    state = describe_state(run, source, parameters)
    print(f"{title}: begun", flush=True)
    result = execute(source, target, parameters, title)
    # Sources count as they were at the start, results as they are at the end.
    state["results"] = describe_state(run, source, parameters)["results"]
    run.update(lambda manifest: manifest["notebooks"].update({source.stem: state | result}))
    spent, peak = tqdm.format_interval(result["wall_seconds"]), result["peak_memory_bytes"] / 2**30
    print(f"{title}: {result['status']} in {spent}, peak {peak:.2f} GiB", flush=True)
    if result["status"] == "interrupted":
        raise KeyboardInterrupt
    if result["status"] == "failed":
        print(f"\n{result['error']}", flush=True)
        raise HallulibError(
            f"Notebook {source.stem} stopped in cell '{result['cell']}', with the words above.",
            f"The same command continues; what has run is kept, also in {display_path(target)}.",
        )


class ThisPython(AsyncKernelManager):
    """Starts kernels with the interpreter that runs us, whatever kernels the user has installed."""

    async def _async_start_kernel(self, **options: Any) -> None:
        # What a kernel says outside of its cells, on a crash or on Ctrl-C, is nothing to act on.
        await super()._async_start_kernel(stderr=subprocess.DEVNULL, **options)

    start_kernel = _async_start_kernel

    @property
    def kernel_spec(self) -> KernelSpec:
        """ipykernel's own spec; its command is sys.executable."""
        return KernelSpec(**get_kernel_dict())


def execute(source: Path, target: Path, parameters: dict[str, Any], title: str) -> dict[str, Any]:
    """Run `source` from its own folder, as JupyterLab does; `target` keeps all that ran.

    Returns `status` (done, failed or interrupted), the last `cell` begun, what it raised as
    `error`, `wall_seconds`, and `peak_memory_bytes` of all kernel processes together.
    """
    result, start = {"status": "failed", "cell": "", "error": ""}, time.perf_counter()
    cells = len(nbformat.read(source, as_version=4).cells) + 1  # and the injected parameters
    bar = tqdm(total=cells, desc=title, unit="cell", disable=None, leave=False)

    def follow(cell: Any, cell_index: int) -> None:
        result["cell"] = cell["id"]
        bar.update(cell_index - bar.n)

    # Each sample moves the bar's clock, so that one sees a long cell is alive.
    with bar, sample_peak(children=True, on_sample=bar.refresh) as peak:
        try:
            options = {"kernel_manager_class": ThisPython, "on_cell_start": follow}
            options |= {"cwd": source.parent, "progress_bar": False}
            papermill.execute_notebook(source, target, parameters, **options)
            result["status"] = "done"
        except KeyboardInterrupt:
            result["status"] = "interrupted"
        except PapermillExecutionError as error:
            result["error"] = f"{error.ename}: {error.evalue}"
        except DeadKernelError:
            result["error"] = "The kernel died, most often for want of memory."
    measured = {"wall_seconds": time.perf_counter() - start, "peak_memory_bytes": peak["bytes"]}
    return result | measured


def publish_gallery(
    run: Run, notebooks: str | Path = "notebooks", target: str | Path = GALLERY
) -> list[Path]:
    """Copy a run's executed notebooks to the gallery and stamp each; returns the copies.

    Raises DataError, before anything is written, unless every notebook ran to its end from its
    present source and no copy names a folder of this machine.
    """
    manifest, copies = run.manifest, {}
    versions = next(iter(manifest["stages"].values()), {}).get("versions", {})
    known = {"recipe": manifest["recipe"]["name"], "versions": versions}
    for source in find_notebooks(notebooks):
        record = manifest["notebooks"].get(source.stem, {})
        if record.get("status") != "done" or record["source_sha"] != sha256_file(source):
            raise _refuse(source.stem, "has not run to its end from its present source")
        notebook = nbformat.read(run.path(f"notebooks/{source.name}"), as_version=4)
        stamp = ("source_sha", "parameters", "wall_seconds", "peak_memory_bytes")
        notebook.metadata["hallulib"] = known | {key: record[key] for key in stamp}
        del notebook.metadata["papermill"]  # it names folders of this machine
        text = nbformat.writes(notebook)
        if str(Path.home()) in text or str(project_root()) in text:
            raise _refuse(source.stem, "prints a path of this machine")
        copies[resolve_path(target) / source.name] = text
    for path, text in copies.items():
        write_text_atomic(path, text + "\n")
    return list(copies)


def _refuse(name: str, why: str) -> DataError:
    what = f"The gallery cannot take notebook {name}: it {why}."
    return DataError(what, "Run `python -m hallulib course` first; the gallery is unchanged.")
