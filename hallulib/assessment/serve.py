"""The assessment without Jupyter's cells: the same notebook through Voila, on loopback, behind a
token.

Voila lets a page send messages to its widgets only, never code. It serves a folder of its own that
holds one notebook, so that no path a visitor gives leads anywhere else.
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


def serve_assessment(run: Run, recipe: Recipe, overrides: Mapping[str, Any], port: int) -> None:
    """Serve this run's assessment until Ctrl-C or SIGTERM, and print the address that lets one in.

    Raises MissingArtifact before notebook 06, SessionError when the server ends by itself.
    """
    run.require("evaluation/generations.jsonl")
    token, root = secrets.token_urlsafe(16), str(run.root.resolve())
    values = {"recipe": recipe.name, "run_dir": root, "overrides": dict(overrides)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the server too
    with TemporaryDirectory(prefix="assessment-") as name:
        server = start_server(Path(name), values, token, port)
        try:  # from here on the server ends with this process, whenever a signal comes
            address = f"http://127.0.0.1:{port}/?token={token}"
            print(f"Assessment of {recipe.assessment.assessor}: {address}")
            print("Open it in a browser; Ctrl-C here ends it. All grades are saved.", flush=True)
            server.wait()
        finally:
            server.terminate()
            server.wait()
    raise SessionError(
        f"The server ended by itself (status {server.returncode}); its last lines say why.",
        f"If port {port} is in use, choose another: --port {port + 1}.",
    )


def start_server(folder: Path, values: dict[str, Any], token: str, port: int) -> subprocess.Popen:
    """Start Voila on one page, the cells of notebook 07 with the tag "assessor" (the rest is
    lessons, and the analysis names systems): no files, no tracebacks, and a token, which stands in
    a file, as everybody can read a command line.

    Its page gets no XSRF cookie, so the request with which it ends its kernel on leaving is refused
    and a page loaded anew would find the session open; the kernel's random id guards that request.
    """
    notebook = nbformat.read(project_root() / "notebooks/07_assessment_widget.ipynb", as_version=4)
    notebook.cells = [c for c in notebook.cells if "assessor" in c.metadata.get("tags", [])]
    parameters = next(cell for cell in notebook.cells if cell.id == "parameters")
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    page, settings = folder / "page" / "assessment.ipynb", folder / "voila.json"
    page.parent.mkdir()
    nbformat.write(notebook, page)
    options = json.loads(Path(__file__).with_name("voila.json").read_text("utf-8"))
    options["Voila"] |= {"port": port, "token": token, "root_dir": str(page.parent)}
    settings.touch(0o600)  # Voila reads it from the folder in which it is started
    settings.write_text(json.dumps(options))
    paths = [str(project_root()), os.environ.get("PYTHONPATH", "")]  # wherever the page lies
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # were the file not read, the token would be one that nobody knows
    command = [sys.executable, "-m", "voila", str(page), "--Voila.auto_token=True"]
    return subprocess.Popen(command, cwd=folder, env=env)
