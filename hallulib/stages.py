"""The stages, as stages.yaml lists them, and all that decides a stage beside its inputs."""

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from hallulib.files import resolve_path, sha256_text, sha256_tree
from hallulib.recipe import Recipe

PACKAGE = Path(__file__).parent
LIBRARIES = (
    "torch transformers peft accelerate datasets tokenizers pandas pyarrow scipy statsmodels "
    "scikit-learn rouge-score sacrebleu"
).split()


_TABLE = yaml.safe_load((PACKAGE / "stages.yaml").read_text("utf-8"))
# Each has notebook, door, inputs, outputs, sections and code; the table says what these are.
STAGES = {name: SimpleNamespace(**row) for name, row in _TABLE.items()}


def find_producer(artifact: str) -> tuple[str, str]:
    """(stage, output) of `artifact`, which is a declared output or a path below one."""
    for name, spec in STAGES.items():
        for output in spec.outputs:
            if artifact == output or artifact.startswith(f"{output}/"):
                return name, output
    raise KeyError(f"no stage writes '{artifact}'")


def list_causes(stage: str, recipe: Recipe) -> dict[str, Any]:
    """All that decides a stage beside its inputs: settings, code, what it reads from outside."""
    sections = STAGES[stage].sections
    outside = {
        "model": recipe.model.name_or_path,
        "data": recipe.data.path,
        "evaluation": recipe.evaluation.nli_model,
    }
    return {
        "sections": recipe.choose_sections(sections),
        "code": hash_code(STAGES[stage].code),
        "external": {name: _hash_outside(outside[name]) for name in sections if name in outside},
    }


def find_code(names: Iterable[str]) -> set[Path]:
    """The sources and tables of rooms ("dpo") and modules ("dpo/pairs") of this package."""
    patterns = [pattern for name in names for pattern in (f"{name}.py", f"{name}/**/*")]
    found = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    return {path for path in found if path.suffix in (".py", ".yaml", ".json", ".j2")}


def hash_code(names: Iterable[str]) -> str:
    """sha256 of the names and texts of `find_code(names)`, line endings normalised."""
    files = sorted(find_code(names))
    texts = [f"{f.relative_to(PACKAGE).as_posix()}\n{f.read_text('utf-8')}" for f in files]
    return sha256_text("\0".join(texts))


def _hash_outside(name: str) -> str:
    """A local model or data file by content (or the checksums it brings); "" for a hub id."""
    path = resolve_path(name)
    if not name or not path.exists():
        return ""
    sums = path / "SHA256SUMS.json"
    return sha256_tree(sums if sums.is_file() else path)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that move the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
