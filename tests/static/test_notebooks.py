"""The notebooks as files: valid, addressable, stripped, and true to the parameter contract."""

import ast
import itertools
import re

import nbformat
import pytest

from hallulib.course import GALLERY
from hallulib.files import project_root, sha256_file
from hallulib.notebook import check_parameters
from hallulib.stages import STAGES

pytestmark = pytest.mark.static

ROOT = project_root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TAGS = {"parameters", "setup", "exercise", "solution", "check", "results", "slow", "assessor"}
SLIDE_TYPES = {"slide", "subslide", "fragment", "skip", "notes", "-"}
SHARED = {"recipe": "tiny-cpu", "run_dir": "", "overrides": {}}
# Home folders and Windows drives; a notebook that names one ran on somebody's machine.
HOME_PATH = re.compile(r"/(home|Users|root)/\w|[A-Z]:\\\\\w")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def parameters_cell(path):
    return next(cell for cell in code_cells(path) if "parameters" in tags(cell))


def plain_python(source):
    """A cell without IPython lines (%magic, !command, help?), so that Python can parse it."""
    lines = [line for line in source.splitlines() if not re.match(r"\s*[%!?]|.*\?$", line)]
    return "\n".join(lines)


def test_there_is_a_notebook_for_every_stage_and_they_are_numbered_without_a_gap():
    names = [path.stem for path in NOTEBOOKS]
    assert {spec.notebook for spec in STAGES.values()} <= set(names)
    assert [name[:2] for name in names] == [f"{n:02}" for n in range(1, len(names) + 1)]
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", name) for name in names)


@each_notebook
def test_it_is_valid_nbformat_4_5_for_the_kernel_python3(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"


@each_notebook
def test_its_cell_ids_are_unique_and_readable(path):
    ids = [cell.id for cell in read(path).cells]
    assert len(ids) == len(set(ids))
    unreadable = [i for i in ids if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", i)]
    random = [i for i in ids if re.fullmatch(r"[0-9a-f]{8}", i)]
    assert unreadable + random == []


@each_notebook
def test_it_is_stored_without_outputs_and_counts(path):
    assert [c.id for c in code_cells(path) if c.outputs or c.execution_count is not None] == []
    assert "papermill" not in read(path).metadata and "widgets" not in read(path).metadata


@each_notebook
def test_it_names_no_home_folder(path):
    assert HOME_PATH.search(path.read_text("utf-8")) is None


@each_notebook
def test_its_tags_are_from_the_vocabulary(path):
    assert {tag for cell in read(path).cells for tag in tags(cell)} <= TAGS


@each_notebook
def test_every_cell_has_slideshow_metadata(path):
    kinds = {c.id: c.metadata.get("slideshow", {}).get("slide_type") for c in read(path).cells}
    assert {i: kind for i, kind in kinds.items() if kind not in SLIDE_TYPES} == {}


@each_notebook
def test_it_has_one_parameters_cell_directly_after_the_setup(path):
    cells = code_cells(path)
    assert [("parameters" in tags(cell)) for cell in cells].count(True) == 1
    assert "setup" in tags(cells[0]) and "parameters" in tags(cells[1])


@each_notebook
def test_its_parameters_are_literals_with_a_trailing_comment(path):
    source = parameters_cell(path).source
    for statement in ast.parse(source).body:
        assert isinstance(statement, ast.Assign), ast.unparse(statement)
        assert isinstance(statement.targets[0], ast.Name)
        ast.literal_eval(statement.value)
        assert "  # " in source.splitlines()[statement.end_lineno - 1], ast.unparse(statement)


@each_notebook
def test_the_shared_parameters_are_declared_as_papermill_sees_them(path):
    check_parameters(path, SHARED)
    defaults = {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse(parameters_cell(path).source).body
    }
    assert SHARED.items() <= defaults.items()


@each_notebook
def test_every_parameter_is_read_by_a_later_cell(path):
    cells = code_cells(path)
    later = itertools.dropwhile(lambda cell: "parameters" not in tags(cell), cells)
    trees = [ast.parse(plain_python(cell.source)) for cell in list(later)[1:]]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read_names = {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
    declared = {s.targets[0].id for s in ast.parse(parameters_cell(path).source).body}
    assert declared - read_names == set()


@each_notebook
def test_its_code_fits_a_slide(path):
    for cell in code_cells(path):
        lines = cell.source.splitlines()
        assert max(map(len, lines), default=0) <= 80, cell.id
        if not tags(cell) & {"exercise", "solution", "check"}:
            assert len(lines) <= 15, cell.id


@each_notebook
def test_it_has_25_to_50_cells(path):
    assert 25 <= len(read(path).cells) <= 50


@each_notebook
def test_it_begins_with_a_title_and_ends_with_what_it_cannot_conclude(path):
    prose = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    assert prose[0].startswith("# ")
    assert any("cannot conclude" in text.lower() for text in prose)


@each_notebook
def test_it_installs_nothing_changes_no_folder_and_logs_in_nowhere(path):
    code = "\n".join(cell.source for cell in code_cells(path))
    for forbidden in ("pip install", "os.chdir", "login(", "tqdm.notebook", "wandb", "%cd"):
        assert forbidden not in code


@each_notebook
def test_it_says_nothing_of_tests(path):
    """One code path: a smaller run is another override, never a branch."""
    code = "\n".join(cell.source for cell in code_cells(path))
    assert not re.search(r"\b(IS_TEST|TESTING|PYTEST|if test\b|if CI\b)", code, re.IGNORECASE)


@each_notebook
def test_the_gallery_shows_the_present_source_run_in_order(path):
    copy = ROOT / GALLERY / path.name
    shown = read(copy)
    assert shown.metadata["hallulib"]["source_sha"] == sha256_file(path)
    counts = [cell.execution_count for cell in code_cells(copy) if cell.source]
    assert counts == list(range(1, len(counts) + 1))
    assert HOME_PATH.search(copy.read_text("utf-8")) is None


def test_the_gallery_holds_no_other_notebook():
    assert [p.name for p in sorted((ROOT / GALLERY).glob("*.ipynb"))] == [p.name for p in NOTEBOOKS]
