"""The page for assessors who should not see code, as a file and as a command; no server."""

import ast
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time

import nbformat
import psutil
import pytest

from hallulib.assessment import serve
from hallulib.assessment.serve import serve_assessment
from hallulib.errors import MissingArtifact
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit


def start(folder, monkeypatch):
    """What would be started: (command, options of the server, the page's notebook)."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args))
    values = {"recipe": "tiny-cpu", "run_dir": "a run", "overrides": {"assessment.assessor": "d"}}
    serve.start_server(folder, values, "secret", 8866)
    options = json.loads((folder / "voila.json").read_text())
    return started[0][0], options, nbformat.read(folder / "page" / "assessment.ipynb", 4)


def test_the_page_holds_the_guideline_practice_and_widget_and_knows_its_run(tmp_path, monkeypatch):
    cells = start(tmp_path, monkeypatch)[2].cells
    ids = [cell.id for cell in cells]
    assert "guideline-page" in ids and ids[-1] == "session-widget"
    assert not {"simulated-run", "analyse-run", "unblind-run", "export-run"} & set(ids)
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    values = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(source).body}
    assert values == {
        "recipe": "tiny-cpu", "run_dir": "a run", "overrides": {"assessment.assessor": "d"},
    }  # fmt: skip


def test_the_server_listens_on_loopback_asks_for_a_token_and_serves_no_file(tmp_path, monkeypatch):
    command, options, _ = start(tmp_path, monkeypatch)
    voila = options["Voila"]
    assert (voila["ip"], voila["token"]) == ("127.0.0.1", "secret")
    assert options["VoilaConfiguration"]["file_denylist"] == [".*"]
    assert voila["root_dir"] == str(tmp_path / "page")  # where its own settings are not
    assert "secret" not in " ".join(command) and "--Voila.auto_token=True" in command
    assert stat.S_IMODE(os.stat(tmp_path / "voila.json").st_mode) == 0o600


def test_a_server_ends_with_the_command_that_started_it(tmp_path):
    script = f"""
        import subprocess, sys
        from pathlib import Path
        from hallulib.assessment import serve
        from hallulib.recipe import load_recipe
        from hallulib.run import Run
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        serve.start_server = lambda *args: subprocess.Popen(sleep)
        recipe = load_recipe("tiny-cpu")
        run = Run.open(Path({str(tmp_path)!r}), recipe)
        run.require = lambda artifact: None
        serve.serve_assessment(run, recipe, {{}}, 8866)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert "http://127.0.0.1:8866/?token=" in parent.stdout.readline()
    (child,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == 143
    time.sleep(0.1)
    assert not child.is_running()


def test_an_assessment_before_the_evaluation_names_the_notebook(tmp_path):
    recipe = load_recipe("tiny-cpu")
    with pytest.raises(MissingArtifact, match="06_evaluation"):
        serve_assessment(Run.open(tmp_path, recipe), recipe, {}, port=8866)
