"""The house: it is small, imports point one way, what it needs is there once, pins are complete."""

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from house_reader import (
    MODULES,
    ROOT,
    calls,
    find_closure,
    find_file,
    find_foreign_changes,
    name_of,
    our_imports,
    parse,
    public_definitions,
    room,
    strings,
    their_imports,
    used_names,
    walk,
)
from packaging.requirements import Requirement

from hallulib.stages import PACKAGE, STAGES, find_code

pytestmark = pytest.mark.static

# Lower numbers are lower floors. A module may import from its own floor or below, except that
# three stages never import each other.
FLOORS = {
    name: floor
    for floor, names in enumerate([
        "errors clinic __init__",
        "files rates processes meter",
        "recipe recipe_sections",
        "run stages",
        "plots models scoring generation training checkpoints detectors",
        "data",
        "sft dpo evaluation",
        "memory assessment lesson",
        "course report",
        "cli __main__",
    ])
    for name in names.split()
}  # fmt: skip
APART = {"sft", "dpo", "evaluation"}
# These import nothing of ours, so that they can be read and tested alone.
ALONE = ["errors.py", "rates.py", "dpo/losses.py", *sorted(PACKAGE.glob("clinic/*.py"))]
# They carry a stage but move no number of it: an edit there makes no stage stale.
PLUMBING = {
    f"hallulib.{name}"
    for name in "errors files meter plots processes recipe recipe_sections run stages".split()
}
# Installed because something starts or loads them, not because our code imports them.
STARTED = {
    "accelerate", "bitsandbytes", "ipykernel", "ipywidgets", "jupyterlab", "tensorboard", "voila",
}  # fmt: skip

TESTS = sorted((ROOT / "tests").rglob("*.py"))
ASSETS = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Who may use the package: what only tests use is nobody's.
USERS = [
    *MODULES,
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "data").rglob("*.py")),
]

IMPORT = r"^\s*(?:from (hallulib\S*) import \(?([^)\n]*)|import (hallulib\S*))"

each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


def count_lines(path):
    return len(path.read_text("utf-8").splitlines())


# --- small ---


# A ratchet on its way: the goals are 9,300 lines, 7,800 lines of tests and 60 kB of assets. Lower
# these with every cut, never raise them.
MOST_LINES, MOST_TEST_LINES, MOST_ASSET_BYTES = 10_300, 10_200, 76_000


def test_the_package_stays_small_and_so_do_its_tests():
    assert sum(map(count_lines, MODULES)) <= MOST_LINES and len(MODULES) <= 80
    assert sum(map(count_lines, TESTS)) <= MOST_TEST_LINES


@pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=lambda path: path.name)
def test_a_file_stays_below_300_lines(path):
    assert count_lines(path) <= (500 if path in TESTS else 300)


def test_no_room_has_more_than_ten_files_and_the_assets_stay_small():
    rooms = {folder: len(list(folder.glob("*.py"))) for folder in {m.parent for m in MODULES}}
    assert {f.name: n for f, n in rooms.items() if n > 10 and f != PACKAGE} == {}
    assert sum(path.stat().st_size for path in ASSETS) <= MOST_ASSET_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_at_most_five_of_our_modules(path):
    found = set()
    for module, names, whole in re.findall(IMPORT, read_code(path), re.MULTILINE):
        parts = [f"{module}.{name}" for name in re.findall(r"(\w+)(?: as \w+)?", names)]
        found |= {part if find_file(part) else module for part in parts} or {whole}
    assert len(found) <= 5, sorted(found)


def read_code(path):
    """The code cells of a notebook as one text."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return "\n".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "code")


# --- one way ---


@each_module
def test_imports_point_down(path):
    mine = room(name_of(path))
    for module in our_imports(path):
        theirs = room(module)
        assert FLOORS[theirs] <= FLOORS[mine], f"{mine} must not import {module}"
        if {mine, theirs} <= APART:
            assert mine == theirs, f"stage {mine} must not reach into {module}"


def test_no_import_goes_in_a_circle():
    graph = {name_of(path): our_imports(path) for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("name", ALONE, ids=lambda name: str(name).rpartition("hallulib/")[2])
def test_it_imports_nothing_of_ours(name):
    inside = "hallulib.clinic" if "clinic" in str(name) else "nothing"
    assert {m for m in our_imports(PACKAGE / name) if not m.startswith(inside)} == set()


@each_module
def test_its_imports_are_absolute_and_it_changes_nothing_that_lives_in_another_module(path):
    assert [node.lineno for node in walk(path, ast.ImportFrom) if node.level] == []
    assert find_foreign_changes(path) == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_source_that_a_stage_runs_counts_for_its_key(stage):
    """So that an edit which moves a number makes the stage stale."""
    listed = find_code(STAGES[stage].code)
    runs = find_closure(path for path in listed if path.suffix == ".py")
    runs = {path for path in runs - listed if name_of(path) not in PLUMBING}
    # The door of a room hands on names; what is behind them is imported by its own name too.
    assert [name_of(path) for path in sorted(runs) if path.name != "__init__.py"] == []
    module = STAGES[stage].door.split(":")[0]
    assert listed & find_code([module])


def test_importing_the_package_loads_no_torch():
    code = "import sys, hallulib, hallulib.recipe, hallulib.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- once ---


def test_no_public_name_is_used_by_tests_alone():
    texts = [ROOT / "Makefile", ROOT / "pyproject.toml", *NOTEBOOKS]
    used = {word for path in texts for word in re.findall(r"\w+", path.read_text("utf-8"))}
    used = used.union(*map(used_names, USERS))
    unused = [
        f"{name_of(path)}.{name}"
        for path in MODULES
        for name in public_definitions(path)
        if name not in used
    ]
    assert unused == []


def has_sentence_ends(path):
    """A pattern that knows where a sentence ends."""
    return any(
        re.search(r"\[\^?[!?;]*\.[!?]|\[\^?[!?]+\.|\\\.\(\?=\\s", text) for text in strings(path)
    )


def reads_json_lines(path):
    """json.loads inside a loop over lines."""
    loops = walk(path, ast.For, ast.While, ast.ListComp, ast.GeneratorExp, ast.DictComp)
    lines = [loop for loop in loops if "line" in ast.unparse(loop).lower()]
    return any("json.loads(" in ast.unparse(loop) for loop in lines)


def writes_json_lines(path):
    """json.dumps(row) + "\\n", unless it is one indented text."""
    sums = [node for node in walk(path, ast.BinOp) if ast.unparse(node.right) == "'\\n'"]
    rows = [node.left for node in sums if node.left in calls(path, "json.dumps")]
    return any(all(k.arg != "indent" for k in row.keywords) for row in rows)


def writes_atomically(path):
    """os.replace, or a path's own replace: a method `replace` with one argument."""
    moves = [n for n in walk(path, ast.Call) if getattr(n.func, "attr", "") == "replace"]
    one = [n for n in moves if len(n.args) == 1 and not n.keywords]
    return bool(one or calls(path, "os.replace", "os.rename"))


def makes_tables(path):
    """Cells in HTML or in Markdown, or columns padded by hand."""
    return any(re.search(r"<td|<tr|\|-{3}|\| ?-{3}", text) for text in strings(path))


def has_an_interval(path):
    """A class of a number with its interval."""
    classes = walk(path, ast.ClassDef)
    fields = [{n.target.id for n in c.body if isinstance(n, ast.AnnAssign)} for c in classes]
    return any({"low", "high"} <= names for names in fields)


def lists_reference_strategies(path):
    """A table at the top of a module, or a class, of the ways to keep the reference model."""
    tables = [node for node in parse(path).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    named = [ast.unparse(node).split("=")[0] for node in tables]
    named += [node.name for node in walk(path, ast.ClassDef)]
    return any(re.search("strateg", name, re.IGNORECASE) for name in named)


@pytest.mark.parametrize(
    ("finds", "where"),
    [
        (has_sentence_ends, ["hallulib.clinic.facts", "hallulib.detectors.tokens"]),
        (reads_json_lines, ["hallulib.files"]),
        (writes_json_lines, ["hallulib.files"]),
        (writes_atomically, ["hallulib.files"]),
        (makes_tables, []),  # pandas and the templates make them
        (has_an_interval, ["hallulib.rates"]),
        (lists_reference_strategies, ["hallulib.memory.passes"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_it_stands_once_in_the_house(finds, where):
    """The clinic, which imports nothing of ours, knows where its own sentences end."""
    assert [name_of(path) for path in MODULES if finds(path)] == where


def test_the_drugs_stand_in_one_list():
    """The clinic's world takes its own few; a list is where half of the known names stand."""
    words = yaml.safe_load((PACKAGE / "detectors" / "words.yaml").read_text("utf-8"))
    drugs = re.findall(r"\w{5,}", words["entities"]["drug"])
    lists = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".yaml", ".json")
        and sum(drug in path.read_text("utf-8").lower() for drug in drugs) > len(drugs) / 2
    ]
    assert lists == ["detectors/words.yaml"]


# --- pinned, shipped, nameless ---


def read_pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def test_every_requirement_is_pinned_exactly():
    for requirement in read_pins("requirements.txt") + read_pins("requirements-dev.txt"):
        assert re.fullmatch(r"==\d[\w.]*", str(requirement.specifier)), requirement
    assert "torch==2.13.0" in map(str, read_pins("requirements.txt"))


def test_what_the_package_imports_is_pinned_and_what_is_pinned_is_used():
    import_names = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
    pinned = {requirement.name.lower() for requirement in read_pins("requirements.txt")}
    pinned_imports = {import_names.get(name, name.replace("-", "_")) for name in pinned}
    imported = set().union(*map(their_imports, USERS[: len(MODULES)])) - sys.stdlib_module_names
    builders = set().union(*map(their_imports, (ROOT / "data" / "build").glob("*.py")))
    assert imported - pinned_imports == set()
    imported |= builders
    in_notebooks = "\n".join(map(read_code, NOTEBOOKS))
    unused = {name for name in pinned_imports - imported - STARTED if name not in in_notebooks}
    assert unused == set()


def test_every_asset_is_shipped_and_the_continuous_integration_runs_make_test():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["hallulib"]
    assert ASSETS == {path for p in patterns for path in PACKAGE.glob(p) if path in ASSETS}
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and "make test" in script.read_text()


def test_no_file_names_a_folder_of_one_machine():
    pattern = re.compile(r"(?<![\w.~])/(home|Users|root|work|opt|mnt)/\w|[A-Z]:\\\\?Users")
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".ipynb", ".csv", ".cfg"}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = {path for path in map(ROOT.joinpath, listed.splitlines()) if path.is_file()}
    named = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths - {*(ROOT / "tests" / "static").glob("test_*.py")}
        if path.suffix in suffixes or path.name in ("Makefile", "run")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert named == []
