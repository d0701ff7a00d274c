"""One notebook: its parameter contract, and one execution with papermill that one can follow."""

from __future__ import annotations

import ast
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
import zmq
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from hallulib.errors import RecipeError
from hallulib.files import display_path, project_root
from hallulib.meter import PeakSampler
from hallulib.recipe import name_nearest


class ThisPython(AsyncKernelManager):
    """Starts kernels with the interpreter that runs us, whatever kernels the user has installed."""

    log_path = os.devnull

    def __init__(self, **options: Any) -> None:
        # Without it every kernel warns on the terminal that others on this machine could listen.
        encryption = "auto" if zmq.has("curve") else "disabled"
        super().__init__(transport_encryption=encryption, **options)

    async def _async_start_kernel(self, **options: Any) -> None:
        # What a kernel says outside of its cells, on a crash or on Ctrl-C, is for a log.
        with open(self.log_path, "a", encoding="utf-8") as log:
            await super()._async_start_kernel(stderr=log, **options)

    start_kernel = _async_start_kernel

    @property
    def kernel_spec(self) -> KernelSpec:
        """ipykernel's own spec; its command is sys.executable."""
        return KernelSpec(**get_kernel_dict())


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Raise RecipeError unless the notebook declares each parameter, with a literal of its type.

    papermill only warns of an unknown name, and passes on what it is given.
    """
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


def execute(source: Path, target: Path, parameters: dict[str, Any], title: str) -> dict[str, Any]:
    """Run `source` from its own folder, as JupyterLab does; the executed copy goes to `target`.

    Returns `status` (done, failed or interrupted), the last `cell` begun, what it raised as
    `error`, `wall_seconds`, and `peak_memory_bytes` of all kernel processes together. Neither a
    failing cell nor Ctrl-C raises; the copy keeps all that ran.
    """
    result: dict[str, Any] = {"status": "failed", "cell": "", "error": ""}
    log = target.with_suffix(".log")
    log.unlink(missing_ok=True)
    start, sampler = time.perf_counter(), PeakSampler(children=True, interval=0.2).start()
    try:
        _run_papermill(source, target, parameters, log, _show_progress(title, source, result))
        result["status"] = "done"
    except KeyboardInterrupt:
        result["status"] = "interrupted"
    except PapermillExecutionError as error:
        result["error"] = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        result["error"] = f"The kernel died, most often for want of memory: see {display_path(log)}"
    finally:
        result["wall_seconds"] = time.perf_counter() - start
        result["peak_memory_bytes"] = sampler.stop()
    if log.exists() and not log.stat().st_size:
        log.unlink()
    return result


def _run_papermill(
    source: Path, target: Path, parameters: dict[str, Any], log: Path, progress: Any
) -> None:
    """papermill, quiet, with project-relative names: it writes them into the executed copy."""
    logging.getLogger("papermill").setLevel(logging.WARNING)
    root = project_root()
    names = [str(p.relative_to(root) if p.is_relative_to(root) else p) for p in (source, target)]
    with progress as follow, papermill.utils.chdir(str(root)):
        papermill.execute_notebook(
            *names,
            parameters=parameters,
            progress_bar=False,
            cwd=str(source.parent),
            kernel_manager_class=type("Kernel", (ThisPython,), {"log_path": str(log)}),
            on_cell_start=follow,
        )


@contextmanager
def _show_progress(title: str, source: Path, result: dict[str, Any]) -> Iterator[Any]:
    """A line on the cells, and a clock that goes on in a long one; notes the cell in `result`."""
    live, ended = sys.stderr.isatty(), threading.Event()
    bar = tqdm(
        total=len(nbformat.read(source, as_version=4).cells) + 1,  # and the injected parameters
        desc=title,
        bar_format="{desc}: cell {n_fmt}/{total_fmt}, {elapsed}{postfix}",
        mininterval=0.1 if live else 30,
        leave=False,
    )

    def tick() -> None:
        while not ended.wait(0.5 if live else 30):
            bar.refresh()

    def follow(cell: Any, cell_index: int) -> None:
        result["cell"] = cell.get("id", str(cell_index))
        bar.set_postfix_str(result["cell"], refresh=False)
        bar.update(cell_index + 1 - bar.n)

    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield follow
    finally:
        ended.set()
        clock.join()
        bar.close()
