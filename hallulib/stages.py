"""The stages: who runs each, what it reads and writes, and what else decides its numbers."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from hallulib.files import resolve_path, sha256_text, sha256_tree
from hallulib.recipe import Recipe

PACKAGE = Path(__file__).parent
LIBRARIES = (
    "torch transformers peft accelerate datasets tokenizers pandas pyarrow scipy statsmodels "
    "scikit-learn rouge-score sacrebleu"
).split()


@dataclass(frozen=True)
class StageSpec:
    """One stage. `door` is module and function; artifacts are paths inside the run folder.

    `code` are patterns below hallulib/: the sources that can move a number of the stage.
    """

    notebook: str
    door: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sections: tuple[str, ...]
    code: tuple[str, ...]


_DATA = ("data/train.parquet", "data/validation.parquet")
_PAIRS = ("pairs/train.parquet", "pairs/validation.parquet")
_DPO = ("data/validation.parquet", *_PAIRS, "sft/adapter", "reference")
_MODEL = ("models.py", "scoring.py", "generation.py", "training.py")
_JUDGE = ("clinic/*.py", "detectors/*", "rates.py")

# In course order: a stage's inputs are outputs of stages above it.
STAGES: dict[str, StageSpec] = {
    "data": StageSpec(
        notebook="01_data_prep",
        door="data:prepare_data",
        inputs=(),
        outputs=(*_DATA, "data/test.parquet", "data/audit.json"),
        sections=("data", "model"),
        code=("data/*.py", "models.py", *_JUDGE),
    ),
    "sft": StageSpec(
        notebook="02_sft",
        door="sft:train_sft",
        inputs=_DATA,
        outputs=("sft/adapter", "sft/metrics.jsonl"),
        sections=("model", "lora", "sft"),
        code=("sft.py", *_MODEL),
    ),
    "memory": StageSpec(
        notebook="03_memory_budget",
        door="memory:predict_budget",
        inputs=("data/audit.json",),
        outputs=("budget/budget.json",),
        sections=("model", "lora", "sft", "pairs", "reference", "dpo", "memory"),
        code=("memory/**/*", "dpo/*.py", "sft.py", *_MODEL),
    ),
    "pairs": StageSpec(
        notebook="04_reference_cache",
        door="dpo:build_pairs",
        inputs=("data/train.parquet", "sft/adapter"),
        outputs=(*_PAIRS, "pairs/candidates.jsonl"),
        sections=("model", "pairs"),
        code=("dpo/pairs.py", *_MODEL, *_JUDGE),
    ),
    "reference": StageSpec(
        notebook="04_reference_cache",
        door="dpo:cache_reference",
        inputs=(*_PAIRS, "sft/adapter"),
        outputs=("reference",),
        sections=("model", "reference"),
        code=("dpo/reference*.py", "dpo/batching.py", "dpo/logprobs.py", "dpo/prefix_sharing.py")
        + _MODEL,
    ),
    "dpo": StageSpec(
        notebook="05_sequential_dpo",
        door="dpo:train_dpo",
        inputs=_DPO,
        outputs=("dpo/adapter", "dpo/metrics.jsonl"),
        sections=("model", "dpo"),
        code=("dpo/*.py", *_MODEL, *_JUDGE),
    ),
    "comparison": StageSpec(
        notebook="05_sequential_dpo",
        door="dpo:train_comparison_arms",
        inputs=_DPO,
        outputs=("dpo/arms",),
        sections=("model", "dpo"),
        code=("dpo/*.py", *_MODEL, *_JUDGE),
    ),
    "evaluation": StageSpec(
        notebook="06_evaluation",
        door="evaluation:evaluate_systems",
        inputs=("data/test.parquet", "sft/adapter", "dpo/adapter", "dpo/arms"),
        outputs=(
            "evaluation/generations.jsonl",
            "evaluation/evaluation.jsonl",
            "evaluation/summary.json",
            "evaluation/report.html",
            "evaluation/model_card.md",
        ),
        sections=("model", "evaluation"),
        code=("evaluation/*", "data/schema.py", *_MODEL, *_JUDGE),
    ),
    "assessment": StageSpec(
        notebook="07_assessment_widget",
        door="assessment:analyse_assessment",
        inputs=("evaluation/generations.jsonl", "evaluation/evaluation.jsonl"),
        outputs=("assessment/summary.json",),
        sections=("assessment",),
        code=("assessment/*.py", "rates.py"),
    ),
}


def find_producer(artifact: str) -> tuple[str, str]:
    """(stage, output) of `artifact`, which is a declared output or a path below one."""
    for name, spec in STAGES.items():
        for output in spec.outputs:
            if artifact == output or artifact.startswith(f"{output}/"):
                return name, output
    raise KeyError(f"no stage writes '{artifact}'")


def hash_code(patterns: Sequence[str]) -> str:
    """sha256 of the names and texts of our sources and data files, line endings normalised."""
    found = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = sorted(path for path in found if path.suffix in (".py", ".yaml", ".json", ".j2"))
    texts = [f"{f.relative_to(PACKAGE).as_posix()}\n{f.read_text('utf-8')}" for f in files]
    return sha256_text("\0".join(texts))


def hash_external(spec: StageSpec, recipe: Recipe) -> dict[str, str]:
    """What a stage reads from outside the run, by content: a local model, a local data file.

    A hub id is in the recipe already, with its revision; a folder may bring its own checksums.
    """
    found = {}
    for section, name in (
        ("model", recipe.model.name_or_path),
        ("data", recipe.data.path),
        ("evaluation", recipe.evaluation.nli_model),
    ):
        path = resolve_path(name)
        if section in spec.sections and name and path.exists():
            sums = path / "SHA256SUMS.json"
            found[section] = sha256_tree(sums if sums.is_file() else path)
    return found


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that move the numbers."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
