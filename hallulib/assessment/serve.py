"""The assessment without Jupyter's cells: the same notebook, up to its widget, through Voila.

On loopback, behind a token. Voila runs the notebook for each visitor and lets a page send messages
to its widgets only, never code. It serves a folder of its own that holds one notebook, so that no
path a visitor gives leads anywhere else.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat

from hallulib.errors import SessionError
from hallulib.files import project_root
from hallulib.recipe import Recipe
from hallulib.run import Run

NOTEBOOK = "07_assessment_widget.ipynb"
# What an assessor needs; the rest of the notebook is lessons, and the analysis names systems.
SHOWN = (
    "title", "setup", "parameters", "config", "guideline", "guideline-page", "practice-idea",
    "practice-widget", "session-idea", "session-widget",
)  # fmt: skip


def serve_assessment(run: Run, recipe: Recipe, overrides: Mapping[str, Any], port: int) -> None:
    """Serve this run's assessment until Ctrl-C and print the address that lets one in.

    Raises MissingArtifact before notebook 06, SessionError when the server ends by itself.
    """
    run.require("evaluation/generations.jsonl")
    token = secrets.token_urlsafe(16)
    with TemporaryDirectory(prefix="assessment-") as folder:
        page = Path(folder) / "assessment.ipynb"
        write_page(page, recipe.name, run.root, overrides)
        server = subprocess.Popen(voila_command(page, token, port), env=_environment())
        print(f"Assessment of {recipe.assessment.assessor}: http://127.0.0.1:{port}/?token={token}")
        print("Open it in a browser; Ctrl-C here ends it. Grades are saved at once.", flush=True)
        try:
            server.wait()
        finally:
            server.terminate()
            server.wait()
        raise SessionError(
            f"The server ended by itself (status {server.returncode}); its last lines say why.",
            f"If port {port} is in use, choose another: --port {port + 1}.",
        )


def write_page(path: Path, recipe: str, run_dir: Path, overrides: Mapping[str, Any]) -> None:
    """Write the notebook that Voila shows: the cells of notebook 07 that an assessor needs."""
    notebook = nbformat.read(project_root() / "notebooks" / NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id in SHOWN]
    values = {"recipe": recipe, "run_dir": str(run_dir.resolve()), "overrides": dict(overrides)}
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    nbformat.write(notebook, path)


def voila_command(page: Path, token: str, port: int) -> list[str]:
    """How Voila is started: one page, one address, no files, no tracebacks, a token.

    Its page gets no XSRF cookie, so the request with which it ends its kernel on leaving is refused
    and a page loaded anew would find the session open; the kernel's random id guards that request.
    """
    return [
        sys.executable, "-m", "voila", str(page), "--no-browser", f"--port={port}",
        f"--token={token}", "--Voila.ip=127.0.0.1", f"--Voila.root_dir={page.parent}",
        "--Voila.port_retries=0", "--Voila.tornado_settings=disable_check_xsrf=True",
        "--Voila.log_level=WARN",
        "--VoilaConfiguration.file_denylist=.*",
        "--VoilaConfiguration.show_tracebacks=False", "--VoilaConfiguration.strip_sources=True",
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    """The kernels find this project wherever the page lies."""
    paths = [str(project_root()), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
