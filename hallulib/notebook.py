"""One notebook: its parameter contract, and one execution with papermill one can follow."""

from __future__ import annotations

import ast
import difflib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import nbformat
import papermill
import yaml
import zmq
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from hallulib.errors import RecipeError
from hallulib.files import display_path, project_root
from hallulib.meter import PeakSampler


class ThisPython(AsyncKernelManager):
    """Starts kernels with the interpreter that runs us, whatever kernels the user has installed."""

    log_path = os.devnull

    def __init__(self, **options: Any) -> None:
        # Without it every kernel warns on the terminal that others on this machine could listen.
        encryption = "auto" if zmq.has("curve") else "disabled"
        super().__init__(transport_encryption=encryption, **options)

    async def _async_start_kernel(self, **options: Any) -> None:
        # What a kernel says outside of its cells (on a crash, on Ctrl-C) is for a log, not for
        # the reader's terminal; ipykernel itself brings the cells' stderr into the notebook.
        with open(self.log_path, "a", encoding="utf-8") as log:
            await super()._async_start_kernel(stderr=log, **options)

    start_kernel = _async_start_kernel

    @property
    def kernel_spec(self) -> KernelSpec:
        """ipykernel's own spec; its command is sys.executable."""
        return KernelSpec(**get_kernel_dict())


@dataclass
class Execution:
    """How one notebook went. `status` is done, failed or interrupted; `cell` is the last one begun.

    `error` is what the failing cell raised ("Name: message"), "" otherwise.
    """

    status: str = "running"
    cell: str = ""
    wall_seconds: float = 0.0
    peak_memory_bytes: int = 0
    error: str = ""


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Hold `parameters` against those the notebook declares; returns them with the right types.

    papermill only warns on an unknown name and passes text on as text. Here an unknown name is an
    error that names the nearest one, and the literal type of the declared default decides: a value
    of another type is refused, and text is converted ("5e-6" to a float, "false" to a bool) or
    refused. Raises RecipeError.
    """
    declared = papermill.inspect_notebook(str(notebook))
    checked = {}
    for name, value in parameters.items():
        if name not in declared:
            close = difflib.get_close_matches(name, declared, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            # papermill overlooks a line with two equals signs, even if one is in the comment.
            raise RecipeError(
                f"Notebook {notebook.stem} has no parameter '{name}'.{hint}",
                f"It declares: {', '.join(declared) or 'none'}. (A line of the parameters cell "
                "with a second '=', even in its comment, does not count.)",
            )
        checked[name] = _convert(f"{notebook.stem}: {name}", value, declared[name]["default"])
    return checked


def _convert(where: str, value: Any, default_source: str) -> Any:
    """`value` as the type of the literal `default_source`, or RecipeError."""
    try:
        default = ast.literal_eval(default_source)
    except (ValueError, SyntaxError):
        raise RecipeError(
            f"{where} has the default {default_source}, which is not a literal.",
            "Use a plain number, text, list or dict in the parameters cell.",
        ) from None
    wanted = type(default)
    if default is None or type(value) is wanted or (wanted is float and type(value) is int):
        return value
    if isinstance(value, str):
        converted = _parse_text(value, wanted)
        if type(converted) is wanted:
            return converted
    raise RecipeError(
        f"{where} must be {wanted.__name__} like {default_source}, got {value!r}.",
        f"Give a value of type {wanted.__name__}.",
    )


def _parse_text(text: str, wanted: type) -> Any:
    """Text from a command line as int, float, bool (true or false only), list or dict."""
    try:
        if wanted in (int, float):
            return wanted(text)
        if wanted is bool:
            return {"true": True, "false": False}.get(text.lower())
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return None


class Progress:
    """Tells which notebook and cell is running, for how long, and about how much longer.

    On a terminal one line is rewritten every half second. Elsewhere (a log, CI) a line is written
    when a notebook starts and ends, and every 15 seconds between.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self._live = self.stream.isatty()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, text: str) -> None:
        """Write one lasting line."""
        print(("\r\033[K" if self._live else "") + text, file=self.stream, flush=True)

    def start(self, title: str, cells: int, expected_seconds: float | None) -> None:
        """Begin a notebook of `cells` cells that took `expected_seconds` the last time."""
        self.title, self.cells, self.expected = title, cells, expected_seconds
        self.index, self.cell_id, self.began = 0, "", time.perf_counter()
        guess = f", about {format_seconds(expected_seconds)}" if expected_seconds else ""
        self.say(f"{title}: {cells} cells{guess}")
        self._stop.clear()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def cell(self, index: int, cell_id: str) -> None:
        """The cell at `index` (from 0) begins."""
        self.index, self.cell_id = index, cell_id

    def finish(self, text: str) -> None:
        """End the notebook with one lasting line."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        self.say(f"{self.title}: {text}")

    def line(self) -> str:
        """The state now, as "title: cell 3/31 train-adapter, 0:42, about 1:10 left"."""
        elapsed = time.perf_counter() - self.began
        left = (self.expected or 0.0) - elapsed
        if not self.expected and self.index > 2:
            left = elapsed / self.index * (self.cells - self.index)
        rest = f", about {format_seconds(left)} left" if left > 0 else ""
        if self.expected and left <= 0:
            rest = ", longer than last time"
        where = f"cell {self.index + 1}/{self.cells} {self.cell_id}"
        return f"{self.title}: {where}, {format_seconds(elapsed)}{rest}"

    def _tick(self) -> None:
        while not self._stop.wait(0.5 if self._live else 15.0):
            if self._live:
                width = shutil.get_terminal_size().columns - 1
                self.stream.write(f"\r\033[K{self.line()[:width]}")
                self.stream.flush()
            else:
                self.say(self.line())


def execute(
    source: Path, target: Path, parameters: dict[str, Any], progress: Progress
) -> Execution:
    """Run `source` from its own folder, as JupyterLab does; the executed copy goes to `target`.

    Neither a failing cell nor Ctrl-C raises: both are the status of the Execution returned. The
    copy keeps all that ran. The peak is of all kernel processes together, sampled 5 times a second.
    """
    result = Execution()

    def follow(cell: Any, cell_index: int) -> None:
        result.cell = cell.get("id", str(cell_index))
        progress.cell(cell_index, result.cell)

    start, sampler = time.perf_counter(), PeakSampler(children=True, interval=0.2).start()
    try:
        _run_papermill(source, target, parameters, follow)
        result.status = "done"
    except KeyboardInterrupt:
        result.status = "interrupted"
    except PapermillExecutionError as error:
        result.status, result.error = "failed", f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        result.status = "failed"
        result.error = (
            "The kernel died. Most often memory ran out; "
            f"its last words are in {display_path(target.with_suffix('.log'))}."
        )
    finally:
        result.wall_seconds = time.perf_counter() - start
        result.peak_memory_bytes = sampler.stop()
    return result


def _run_papermill(source: Path, target: Path, parameters: dict[str, Any], follow: Any) -> None:
    """papermill, quiet, with project-relative names: it writes them into the executed copy."""
    logging.getLogger("papermill").setLevel(logging.WARNING)
    root = project_root()
    names = [str(p.relative_to(root) if p.is_relative_to(root) else p) for p in (source, target)]
    with _kernel_log(target.with_suffix(".log")) as log, papermill.utils.chdir(str(root)):
        papermill.execute_notebook(
            *names,
            parameters=parameters,
            progress_bar=False,
            cwd=str(source.parent),
            kernel_manager_class=type("Kernel", (ThisPython,), {"log_path": str(log)}),
            on_cell_start=follow,
        )


@contextmanager
def _kernel_log(path: Path) -> Iterator[Path]:
    """A fresh log for one execution; gone again if the kernel had nothing to say."""
    path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        if path.exists() and not path.stat().st_size:
            path.unlink()


def count_cells(source: Path) -> int:
    """Cells of the notebook as it will run: papermill adds one with the injected parameters."""
    return len(nbformat.read(source, as_version=4).cells) + 1


def format_seconds(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 1:02:05."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
