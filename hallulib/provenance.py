"""What each stage reads, writes and depends on, and the facts a manifest records about it."""

from __future__ import annotations

import ast
import json
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from hallulib.files import project_root, resolve_path, sha256_text
from hallulib.recipe import Recipe

PACKAGE = Path(__file__).parent
# Sources that carry a stage but move no number of it: an edit there makes no stage stale.
PLUMBING = set(
    "errors files processes recipe recipe_sections provenance run meter stage plots".split()
)
LIBRARIES = (
    "torch transformers peft accelerate datasets tokenizers pandas pyarrow scipy scikit-learn "
    "rouge-score sacrebleu"
).split()


@dataclass(frozen=True)
class StageSpec:
    """One stage: who runs it, what it reads and writes, which recipe sections and code decide it.

    Artifacts are paths inside the run folder. Code paths are relative to hallulib/; what these
    files import from us counts too.
    """

    notebook: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sections: tuple[str, ...]
    code: tuple[str, ...]


_DATA = ("data/train.parquet", "data/validation.parquet")
_PAIRS = ("pairs/train.parquet", "pairs/validation.parquet")
_DPO = ("data/validation.parquet", *_PAIRS, "sft/adapter", "reference")

# In course order: a stage's inputs are outputs of stages above it.
STAGES: dict[str, StageSpec] = {
    "data": StageSpec(
        "01_data_prep",
        inputs=(),
        outputs=(*_DATA, "data/test.parquet", "data/audit.json"),
        sections=("data", "model"),
        code=("data",),
    ),
    "sft": StageSpec(
        "02_sft",
        inputs=_DATA,
        outputs=("sft/adapter", "sft/metrics.jsonl"),
        sections=("model", "lora", "sft"),
        code=("sft.py",),
    ),
    "memory": StageSpec(
        "03_memory_budget",
        inputs=("data/audit.json",),
        outputs=("budget/budget.json",),
        sections=("model", "lora", "sft", "pairs", "reference", "dpo", "memory"),
        code=("memory", "tracker.py"),
    ),
    "pairs": StageSpec(
        "04_reference_cache",
        inputs=("data/train.parquet", "sft/adapter"),
        outputs=(*_PAIRS, "pairs/candidates.jsonl"),
        sections=("model", "pairs"),
        code=("dpo/pairs.py",),
    ),
    "reference": StageSpec(
        "04_reference_cache",
        inputs=(*_PAIRS, "sft/adapter"),
        outputs=("reference",),
        sections=("model", "reference"),
        code=("dpo/reference.py",),
    ),
    "dpo": StageSpec(
        "05_sequential_dpo",
        inputs=_DPO,
        outputs=("dpo/adapter", "dpo/metrics.jsonl"),
        sections=("model", "dpo"),
        code=("dpo/train.py",),
    ),
    "comparison": StageSpec(
        "05_sequential_dpo",
        inputs=_DPO,
        outputs=("dpo/arms",),
        sections=("model", "dpo"),
        code=("dpo/arms.py",),
    ),
    "evaluation": StageSpec(
        "06_evaluation",
        inputs=("data/test.parquet", "sft/adapter", "dpo/adapter", "dpo/arms"),
        outputs=(
            "evaluation/generations.jsonl",
            "evaluation/evaluation.jsonl",
            "evaluation/summary.json",
            "evaluation/report.html",
            "evaluation/report.md",
            "evaluation/model_card.md",
        ),
        sections=("model", "evaluation"),
        code=("evaluation",),
    ),
    "assessment": StageSpec(
        "07_assessment_widget",
        inputs=("evaluation/generations.jsonl", "evaluation/evaluation.jsonl"),
        outputs=("assessment/summary.json",),
        sections=("assessment",),
        code=("assessment",),
    ),
}


def find_producer(artifact: str) -> str:
    """The stage that writes `artifact` (a declared output, or a path below one)."""
    for name, spec in STAGES.items():
        if any(artifact == out or artifact.startswith(f"{out}/") for out in spec.outputs):
            return name
    raise KeyError(f"no stage writes '{artifact}'")


def find_output(artifact: str) -> str:
    """The declared output that `artifact` is or lies in; this is what the manifest hashes."""
    outputs = STAGES[find_producer(artifact)].outputs
    return next(out for out in outputs if artifact == out or artifact.startswith(f"{out}/"))


def hash_code(spec: StageSpec) -> str:
    """sha256 of the Python sources that a stage runs, line endings normalised."""
    return hash_sources(find_code(spec))


def find_code(spec: StageSpec) -> list[Path]:
    """The stage's sources and all of ours that they import, without the plumbing, sorted."""
    todo: list[Path] = []
    for name in spec.code:
        path = PACKAGE / name
        todo += path.rglob("*.py") if path.is_dir() else [path]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        plumbing = path.parent == PACKAGE and path.stem in PLUMBING
        if path in found or plumbing or not path.is_file():
            continue
        found.add(path)
        todo += _find_imports(path, path.stat().st_mtime_ns)
    return sorted(found)


@cache
def _find_imports(path: Path, stamp: int) -> tuple[Path, ...]:
    """Files of this package that a source imports, also inside functions.

    `stamp` is its time of change, so that an edit in a living kernel is seen.
    """
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = [PACKAGE.joinpath(*m.split(".")[1:]) for m in modules if m.startswith("hallulib.")]
    candidates = [file for base in ours for file in (base.with_suffix(".py"), base / "__init__.py")]
    return tuple(file for file in candidates if file.is_file())


def hash_sources(files: list[Path]) -> str:
    """sha256 of names and texts of files of this package."""
    texts = [f"{f.relative_to(PACKAGE).as_posix()}\n{f.read_text('utf-8')}" for f in files]
    return sha256_text("\0".join(texts))


def hash_external(spec: StageSpec, recipe: Recipe) -> dict[str, str]:
    """What a stage reads from outside the run: a local base model, a local data file.

    A hub id is already in the recipe, with its revision.
    """
    external = {}
    if "model" in spec.sections:
        external["model"] = _fingerprint(recipe.model.name_or_path)
    if "data" in spec.sections and recipe.data.path:
        external["data"] = _fingerprint(recipe.data.path)
    if "evaluation" in spec.sections and recipe.evaluation.nli_model:
        external["nli"] = _fingerprint(recipe.evaluation.nli_model)
    return external


def _fingerprint(name: str) -> str:
    """The checksum list of a folder that has one; else names, sizes and times (cheap for 16 GB)."""
    path = resolve_path(name)
    sums = path / "SHA256SUMS.json"
    if sums.is_file():
        return sha256_text(sums.read_text("utf-8"))
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return sha256_text(json.dumps(stats))


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that move the numbers (those installed)."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def git_commit() -> str:
    """The project's commit, with "-dirty" when files differ from it; "" without git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        done = subprocess.run(
            command, cwd=project_root(), capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
