"""The assessment without Jupyter's cells: the same notebook, up to its widget, through Voila.

On loopback, behind a token. Voila runs the notebook for each visitor and lets a page send messages
to its widgets only, never code. It serves a folder of its own that holds one notebook, so that no
path a visitor gives leads anywhere else.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
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
    """Serve this run's assessment until Ctrl-C or SIGTERM, and print the address that lets one in.

    Raises MissingArtifact before notebook 06, SessionError when the server ends by itself.
    """
    run.require("evaluation/generations.jsonl")
    token = secrets.token_urlsafe(16)
    values = {"recipe": recipe.name, "run_dir": str(run.root.resolve())}
    values["overrides"] = dict(overrides)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the server too
    with TemporaryDirectory(prefix="assessment-") as name:
        server = start_server(Path(name), values, token, port)
        print(f"Assessment of {recipe.assessment.assessor}: http://127.0.0.1:{port}/?token={token}")
        print("Open it in a browser; Ctrl-C here ends it. Grades are saved at once.", flush=True)
        try:
            server.wait()
        finally:
            server.terminate()
            server.wait()
            signal.signal(signal.SIGTERM, before)
    raise SessionError(
        f"The server ended by itself (status {server.returncode}); its last lines say why.",
        f"If port {port} is in use, choose another: --port {port + 1}.",
    )


def start_server(folder: Path, values: dict[str, Any], token: str, port: int) -> subprocess.Popen:
    """Start Voila on one page: no files, no tracebacks, and a token, which stands in a file, as
    everybody on the machine can read a command line.

    Its page gets no XSRF cookie, so the request with which it ends its kernel on leaving is refused
    and a page loaded anew would find the session open; the kernel's random id guards that request.
    """
    page = folder / "page" / "assessment.ipynb"
    page.parent.mkdir()
    write_page(page, values)
    options = {
        "Voila": {
            "ip": "127.0.0.1", "port": port, "port_retries": 0, "token": token,
            "root_dir": str(page.parent), "open_browser": False, "log_level": "WARN",
            "tornado_settings": {"disable_check_xsrf": True},
        },
        "VoilaConfiguration": {
            "file_denylist": [".*"], "show_tracebacks": False, "strip_sources": True,
        },
    }  # fmt: skip
    settings = folder / "voila.json"  # Voila reads it from the folder in which it is started
    settings.touch(0o600)
    settings.write_text(json.dumps(options))
    paths = [str(project_root()), os.environ.get("PYTHONPATH", "")]  # wherever the page lies
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # were the file not read, the token would be one that nobody knows
    command = [sys.executable, "-m", "voila", str(page), "--Voila.auto_token=True"]
    return subprocess.Popen(command, cwd=folder, env=env)


def write_page(path: Path, values: dict[str, Any]) -> None:
    """Write the notebook that Voila shows: the cells of notebook 07 that an assessor needs."""
    notebook = nbformat.read(project_root() / "notebooks" / NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id in SHOWN]
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    nbformat.write(notebook, path)
