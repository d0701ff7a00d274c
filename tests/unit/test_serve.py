"""The page for assessors who should not see code, as a file and as a command; no server."""

import ast

import nbformat
import pytest

from hallulib.assessment.serve import serve_assessment, voila_command, write_page
from hallulib.errors import MissingArtifact
from hallulib.recipe import load_recipe
from hallulib.run import Run

pytestmark = pytest.mark.unit


def test_the_page_holds_the_guideline_practice_and_widget_and_knows_its_run(tmp_path):
    page = tmp_path / "page.ipynb"
    write_page(page, "tiny-cpu", tmp_path / "run", {"assessment.assessor": "dana"})
    cells = nbformat.read(page, as_version=4).cells
    ids = [cell.id for cell in cells]
    assert "guideline-page" in ids and ids[-1] == "session-widget"
    assert not {"simulated-run", "analyse-run", "unblind-run", "export-run"} & set(ids)
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    values = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(source).body}
    assert values == {
        "recipe": "tiny-cpu", "run_dir": str((tmp_path / "run").resolve()),
        "overrides": {"assessment.assessor": "dana"},
    }  # fmt: skip


def test_the_server_listens_on_loopback_asks_for_a_token_and_serves_no_file(tmp_path):
    command = voila_command(tmp_path / "page.ipynb", "secret", 8866)
    assert {"--Voila.ip=127.0.0.1", "--token=secret", "--VoilaConfiguration.file_denylist=.*"} <= {
        *command
    }
    assert f"--Voila.root_dir={tmp_path}" in command


def test_an_assessment_before_the_evaluation_names_the_notebook(tmp_path):
    recipe = load_recipe("tiny-cpu")
    with pytest.raises(MissingArtifact, match="06_evaluation"):
        serve_assessment(Run.open(tmp_path, recipe), recipe, {}, port=8866)
