"""The page for assessors who should not see code, as a file and as a command; no server."""

import ast
import json
import os
import signal
import stat
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

from hallulib.assessment import serve
from hallulib.errors import MissingArtifact
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit


def test_the_page_is_what_an_assessor_needs_behind_a_token_on_loopback(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.extend(command))
    values = {"recipe": "tiny-cpu", "run_dir": "a run", "overrides": {"assessment.assessor": "d"}}
    serve.start_server(tmp_path, values, "secret", 8866)
    cells = nbformat.read(tmp_path / "page" / "assessment.ipynb", 4).cells
    ids = [cell.id for cell in cells]
    assert "guideline-page" in ids and "practice-widget" in ids and ids[-1] == "session-widget"
    assert not {"simulated-run", "analyse-run", "unblind-run", "export-run"} & set(ids)
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    given = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(source).body}
    assert given == values
    options = json.loads((tmp_path / "voila.json").read_text())
    voila = options["Voila"]
    assert (voila["ip"], voila["port"], voila["token"]) == ("127.0.0.1", 8866, "secret")
    assert options["VoilaConfiguration"]["file_denylist"] == [".*"]
    assert voila["root_dir"] == str(tmp_path / "page")  # where its own settings are not
    assert "secret" not in " ".join(started) and "--Voila.auto_token=True" in started
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
Run.require = lambda self, artifact: None
serve.serve_assessment(run, recipe, {{}}, 8866)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert "http://127.0.0.1:8866/?token=" in parent.stdout.readline()
    (child,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == 143
    time.sleep(0.1)
    assert not child.is_running()


def test_an_assessment_before_the_evaluation_names_the_notebook(tmp_path):
    recipe = load_recipe("tiny-cpu")
    with pytest.raises(MissingArtifact, match="06_evaluation"):
        serve.serve_assessment(Run.open(tmp_path, recipe), recipe, {}, port=8866)
