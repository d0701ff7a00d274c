"""The stages, as stages.yaml lists them, and all that decides a stage beside its inputs."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from hallulib.files import resolve_path, sha256_text, sha256_tree
from hallulib.recipe import Recipe

PACKAGE = Path(__file__).parent
LIBRARIES = (
    "torch transformers peft accelerate datasets tokenizers pandas pyarrow scipy statsmodels "
    "scikit-learn rouge-score sacrebleu"
).split()


@dataclass(frozen=True)
class StageSpec:
    """One stage; stages.yaml says what each field is."""

    notebook: str
    door: str
    inputs: list[str]
    outputs: list[str]
    sections: list[str]
    code: list[str]


_TABLE = yaml.safe_load((PACKAGE / "stages.yaml").read_text("utf-8"))
STAGES: dict[str, StageSpec] = {name: StageSpec(**row) for name, row in _TABLE.items()}


def find_producer(artifact: str) -> tuple[str, str]:
    """(stage, output) of `artifact`, which is a declared output or a path below one."""
    for name, spec in STAGES.items():
        for output in spec.outputs:
            if artifact == output or artifact.startswith(f"{output}/"):
                return name, output
    raise KeyError(f"no stage writes '{artifact}'")


def list_causes(stage: str, recipe: Recipe) -> dict[str, Any]:
    """All that decides a stage beside its inputs: settings, code, what it reads from outside."""
    spec = STAGES[stage]
    outside = {
        "model": recipe.model.name_or_path,
        "data": recipe.data.path,
        "evaluation": recipe.evaluation.nli_model,
    }
    return {
        "sections": recipe.choose_sections(spec.sections),
        "code": hash_code(find_code(spec.code)),
        "external": {
            name: _hash_outside(outside[name]) for name in spec.sections if name in outside
        },
    }


def find_code(names: Iterable[str]) -> set[Path]:
    """The sources and tables of rooms ("dpo") and modules ("dpo/pairs") of this package."""
    found = {path for name in names for path in PACKAGE.glob(f"{name}.py")}
    found |= {path for name in names for path in PACKAGE.glob(f"{name}/**/*")}
    return {path for path in found if path.suffix in (".py", ".yaml", ".json", ".j2")}


def hash_code(files: Iterable[Path]) -> str:
    """sha256 of the names and texts of files of this package, line endings normalised."""
    texts = [f"{f.relative_to(PACKAGE).as_posix()}\n{f.read_text('utf-8')}" for f in sorted(files)]
    return sha256_text("\0".join(texts))


def _hash_outside(name: str) -> str:
    """A local model or data file by content (or the checksums it brings); "" for a hub id, which
    the recipe holds already, with its revision."""
    path = resolve_path(name)
    if not name or not path.exists():
        return ""
    sums = path / "SHA256SUMS.json"
    return sha256_tree(sums if sums.is_file() else path)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that move the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
