"""The notebooks as files: valid, addressable, stripped, and true to the parameter contract."""

import ast
import re

import nbformat
import pytest

from hallulib.course import GALLERY, check_parameters
from hallulib.files import project_root, sha256_file
from hallulib.stages import STAGES

pytestmark = pytest.mark.static

ROOT = project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TAGS = {"parameters", "setup", "exercise", "solution", "check", "results", "slow", "assessor"}
SLIDE_TYPES = {"slide", "subslide", "fragment", "skip", "notes", "-"}
SHARED = {"recipe": "tiny-cpu", "run_dir": "", "overrides": {}}
# Home folders and Windows drives; a notebook that names one ran on somebody's machine.
HOME_PATH = re.compile(r"/(home|Users|root)/\w|[A-Z]:\\\\\w")
FORBIDDEN = ["pip install", "os.chdir", "login(", "tqdm.notebook", "wandb", "%cd"]
# One code path: a smaller run is another override, never a branch.
OF_TESTS = re.compile(r"\b(IS_TEST|TESTING|PYTEST|if test\b|if CI\b)", re.IGNORECASE)

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def parse(cell):
    """The tree of a cell without IPython lines (%magic, !command, help?)."""
    lines = [line for line in cell.source.splitlines() if not re.match(r"\s*[%!?]|.*\?$", line)]
    return ast.parse("\n".join(lines))


def test_there_is_a_notebook_for_every_stage_and_they_are_numbered_without_a_gap():
    names = [path.stem for path in NOTEBOOKS]
    assert {spec.notebook for spec in STAGES.values()} <= set(names)
    assert [name[:2] for name in names] == [f"{n:02}" for n in range(1, len(names) + 1)]
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", name) for name in names)


@each_notebook
def test_it_is_valid_nbformat_4_5_for_python3_with_readable_unique_ids_and_known_tags(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids)) and 25 <= len(ids) <= 50
    unreadable = [i for i in ids if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", i)]
    assert unreadable + [i for i in ids if re.fullmatch(r"[0-9a-f]{8}", i)] == []
    assert set().union(*map(tags, notebook.cells)) <= TAGS
    kinds = {c.id: c.metadata.get("slideshow", {}).get("slide_type") for c in notebook.cells}
    assert {i: kind for i, kind in kinds.items() if kind not in SLIDE_TYPES} == {}


@each_notebook
def test_it_is_stored_without_outputs_counts_and_home_folders(path):
    assert [c.id for c in code_cells(path) if c.outputs or c.execution_count is not None] == []
    assert "papermill" not in read(path).metadata and "widgets" not in read(path).metadata
    assert HOME_PATH.search(path.read_text("utf-8")) is None


@each_notebook
def test_its_parameters_follow_the_setup_are_literals_with_a_comment_and_are_read_later(path):
    setup, parameters, *later = code_cells(path)
    assert "setup" in tags(setup) and "parameters" in tags(parameters)
    assert not any("parameters" in tags(cell) for cell in [setup, *later])
    lines, declared = parameters.source.splitlines(), {}
    for statement in parse(parameters).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        declared[statement.targets[0].id] = ast.literal_eval(statement.value)
        assert "  # " in lines[statement.end_lineno - 1], ast.unparse(statement)
    assert SHARED.items() <= declared.items()
    check_parameters(path, SHARED)  # as papermill sees them
    nodes = [node for cell in later for node in ast.walk(parse(cell)) if isinstance(node, ast.Name)]
    assert set(declared) <= {node.id for node in nodes if isinstance(node.ctx, ast.Load)}


@each_notebook
def test_its_code_fits_a_slide_and_leaves_the_machine_and_its_tests_alone(path):
    for cell in code_cells(path):
        lines = cell.source.splitlines()
        assert max(map(len, lines), default=0) <= 80, cell.id
        assert len(lines) <= 15 or tags(cell) & {"exercise", "solution", "check"}, cell.id
        assert [word for word in FORBIDDEN if word in cell.source] == []
        assert OF_TESTS.search(cell.source) is None, cell.id


@each_notebook
def test_it_begins_with_a_title_and_ends_with_what_it_cannot_conclude(path):
    prose = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    assert prose[0].startswith("# ")
    assert any("cannot conclude" in text.lower() for text in prose)


@each_notebook
def test_the_gallery_shows_the_present_source_run_in_order(path):
    copy = ROOT / GALLERY / path.name
    assert read(copy).metadata["hallulib"]["source_sha"] == sha256_file(path)
    counts = [cell.execution_count for cell in code_cells(copy) if cell.source]
    assert counts == list(range(1, len(counts) + 1))
    assert HOME_PATH.search(copy.read_text("utf-8")) is None


def test_the_gallery_holds_no_other_notebook():
    assert [p.name for p in sorted((ROOT / GALLERY).glob("*.ipynb"))] == [p.name for p in NOTEBOOKS]
