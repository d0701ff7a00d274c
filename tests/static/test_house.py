"""The house: imports point one way, files stay small, pins are complete, no machine is named."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from hallulib.files import project_root
from hallulib.provenance import PACKAGE

pytestmark = pytest.mark.static

ROOT = project_root()
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lower numbers are lower floors. A module may import from its own floor or below, except that
# two stages never import each other (memory stands above sft and dpo and may).
FLOORS = {
    "errors": 0, "files": 0, "rates": 0, "__init__": 0, "clinic": 0,
    "processes": 0,
    "recipe_sections": 1, "recipe": 1,
    "provenance": 2, "run": 2, "meter": 2, "tracker": 2,
    "stage": 3, "models": 3, "adapters": 3, "scoring": 3, "detectors": 3, "generation": 3,
    "plots": 3, "training": 3, "watch": 3, "metrics_log": 3, "tokens": 3,
    "perturb": 3,
    "data": 4, "sft": 4, "dpo": 4, "evaluation": 4, "assessment": 4,
    "memory": 5, "lesson": 5,
    "notebook": 6, "report": 6, "course": 6, "gallery": 6,
    "cli": 7, "__main__": 8,
}  # fmt: skip
STAGE_ROOMS = {"data", "sft", "dpo", "evaluation", "assessment"}
# These import nothing of ours, so that they can be read and tested alone.
ALONE = ["clinic", "rates.py", "dpo/losses.py"]
# On the ground floor although they lie in a stage's folder: anyone may import them.
GROUND = {"hallulib.dpo.losses"}
# The row schema is every stage's; it stands beside the detectors, whose Source it fills.
SHARED = {"hallulib.data.schema"}
# Installed because something starts or loads them, not because our code imports them.
STARTED = {
    "accelerate", "bitsandbytes", "filelock", "nbconvert", "ipykernel", "ipywidgets", "jupyterlab",
    "tensorboard", "voila",
}  # fmt: skip


def name_of(path):
    """hallulib.dpo.pairs for hallulib/dpo/pairs.py; hallulib.dpo for its __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    """The part of the house: "dpo" for hallulib.dpo.pairs."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def our_imports(path):
    """Our modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("hallulib")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hallulib"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if find_file(whole) else node.module)
    return found


def find_file(module):
    """The file of one of our modules, or None."""
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def their_imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - {"hallulib"} - set(sys.stdlib_module_names)


each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


@each_module
def test_imports_point_down(path):
    mine = "detectors" if name_of(path) in SHARED else room(name_of(path))
    for module in our_imports(path) - GROUND - SHARED:
        theirs = room(module)
        assert FLOORS[theirs] <= FLOORS[mine], f"{mine} must not import {module}"
        if mine in STAGE_ROOMS and theirs in STAGE_ROOMS:
            assert mine == theirs, f"stage {mine} must not reach into {module}"


@pytest.mark.parametrize("name", ALONE)
def test_it_imports_nothing_of_ours(name):
    path = PACKAGE / name
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        outside = {m for m in our_imports(file) if not name_of(file).startswith(f"{m}.")}
        own = f"hallulib.{path.stem}" if path.is_dir() else "hallulib.nothing"
        assert {m for m in outside if not m.startswith(own)} == set(), file.name


@each_module
def test_imports_are_absolute(path):
    tree = ast.parse(path.read_text("utf-8"))
    assert [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level] == []


@pytest.mark.parametrize(
    "path", [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: path.name
)
def test_a_file_stays_below_300_lines(path):
    limit = 500 if "tests" in path.parts else 300
    assert len(path.read_text("utf-8").splitlines()) <= limit


def test_importing_the_package_loads_no_torch():
    code = "import sys, hallulib, hallulib.recipe, hallulib.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def read_pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def test_every_requirement_is_pinned_exactly():
    for requirement in read_pins("requirements.txt") + read_pins("requirements-dev.txt"):
        assert re.fullmatch(r"==\d[\w.]*", str(requirement.specifier)), requirement
    assert "torch==2.13.0" in map(str, read_pins("requirements.txt"))


def test_what_the_package_imports_is_pinned_and_what_is_pinned_is_used():
    import_names = {"jinja2": "jinja2", "pyyaml": "yaml", "scikit-learn": "sklearn", "pyzmq": "zmq"}
    pinned = {requirement.name for requirement in read_pins("requirements.txt")}
    pinned_imports = {import_names.get(name.lower(), name.replace("-", "_")) for name in pinned}
    imported = set().union(*(their_imports(path) for path in MODULES))
    assert imported - pinned_imports == set()
    in_notebooks = "\n".join(p.read_text("utf-8") for p in (ROOT / "notebooks").glob("*.ipynb"))
    unused = {name for name in pinned_imports - imported - STARTED if name not in in_notebooks}
    assert unused == set()


def test_the_recipes_are_shipped_with_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "recipes/*.yaml" in settings["tool"]["setuptools"]["package-data"]["hallulib"]


def test_the_continuous_integration_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()


def tracked_text_files():
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".ipynb", ".csv", ".cfg"}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for path in map(ROOT.joinpath, listed.stdout.splitlines()):
        if path.is_file() and (path.suffix in suffixes or path.name in ("Makefile", "run")):
            yield path


def test_no_file_names_a_folder_of_one_machine():
    pattern = re.compile(r"(?<![\w.~])/(home|Users|root|work|opt|mnt)/\w|[A-Z]:\\\\?Users")
    named = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_text_files()
        if path.name not in ("test_house.py", "test_notebooks.py")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert named == []
