"""All seven notebooks, executed for real: the default recipe with smaller numbers, nothing else."""

import json
import re

import nbformat
import pytest

from hallulib.course import find_notebooks, run_course
from hallulib.run import Run

pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(900)]

SMALL = {
    "data.train_size": 160,
    "data.validation_size": 24,
    "data.test_size": 24,
    "sft.max_steps": 30,
    "sft.eval_steps": 15,
    "sft.save_steps": 15,
    "pairs.notes": 64,
    "pairs.samples_per_note": 4,
    "dpo.max_steps": 8,
    "dpo.batch_size": 8,
    "dpo.eval_steps": 4,
    "dpo.save_steps": 4,
    "dpo.guardrail_notes": 6,
    "dpo.guardrail_steps": 4,
    "assessment.items": 6,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("course") / "run"
    assert len(run_course("tiny-cpu", root, SMALL)) == 7
    return Run(root)


def _executed(run):
    paths = [run.path(f"notebooks/{source.name}") for source in find_notebooks()]
    return [nbformat.read(path, as_version=4) for path in paths]


def test_every_notebook_runs_to_its_end(run):
    records = run.manifest["notebooks"]
    assert {record["status"] for record in records.values()} == {"done"}
    assert all(record["wall_seconds"] > 0 for record in records.values())
    assert all(record["peak_memory_bytes"] > 0 for record in records.values())


def test_the_executed_copies_ran_in_order_and_show_figures(run):
    for notebook in _executed(run):
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        counts = [cell.execution_count for cell in code if cell.execution_count]
        assert counts == list(range(1, len(counts) + 1))


def test_no_executed_copy_names_a_folder_outside_the_project(run):
    for notebook in _executed(run):
        outputs = json.dumps([cell.get("outputs") for cell in notebook.cells])
        assert not re.search(r"/(?:root|home|Users)/", outputs)


def test_every_checkpoint_is_passed(run):
    for notebook in _executed(run):
        checks = [c for c in notebook.cells if "check" in c.metadata.get("tags", [])]
        assert checks
        assert all("checkpoint passed" in json.dumps(cell.outputs) for cell in checks)


def test_the_report_and_the_evaluation_are_written(run):
    summary = json.loads(run.require("evaluation/summary.json").read_text("utf-8"))
    assert set(summary["systems"]) == {"base", "sft", "dpo", "dpo_plain", "sft_on_chosen"}
    assert summary["n"] == SMALL["data.test_size"]
    assert (run.root / "report.html").stat().st_size > 1000


def test_a_second_call_skips_everything(run):
    assert run_course("tiny-cpu", run.root, SMALL) == []


def test_a_change_of_the_evaluation_redoes_only_what_rests_on_it(run):
    def finished():
        stages = run.manifest["stages"]
        return {name: record["finished_at"] for name, record in stages.items()}

    before = finished()
    run_course("tiny-cpu", run.root, SMALL | {"evaluation.notes": 12}, from_notebook="06")
    after = finished()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"evaluation", "assessment"}
    summary = json.loads(run.require("evaluation/summary.json").read_text("utf-8"))
    assert summary["n"] == 12
