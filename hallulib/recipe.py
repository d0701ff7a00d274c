"""The recipe: the one configuration of a run, validated; loads recipes/*.yaml or your own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as PydanticField

from hallulib.errors import RecipeError
from hallulib.paths import display_path, resolve_path, sha256_text

RECIPES = Path(__file__).parent / "recipes"


def field(default: Any, description: str, **limits: Any) -> Any:
    """A recipe field: its default, one line about it, and its limits."""
    return PydanticField(default, description=description, **limits)


class Section(BaseModel):
    """Unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    name_or_path: str = field("data/base_model", "shipped folder, your own folder, or a hub id")
    revision: str = field("main", "hub revision (branch, tag or commit)")
    quantization: Literal["none", "nf4", "int8"] = field("none", "storage of the base weights")
    dtype: Literal["float32", "bfloat16", "float16"] = field("float32", "type of the computation")
    attention: Literal["sdpa", "eager"] = field("sdpa", "attention implementation")
    device: Literal["auto", "cpu", "cuda", "mps"] = field("auto", "auto = cuda, then mps, then cpu")
    max_length: int = field(512, "longest prompt + completion in tokens", ge=8)
    gradient_checkpointing: bool = field(False, "recompute activations: less memory, more time")


class LoraSection(Section):
    r: int = field(8, "rank of the update", ge=1)
    alpha: int = field(16, "scale of the update is alpha / r", ge=1)
    dropout: float = field(0.0, "dropout before the update; DPO switches it off", ge=0, lt=1)
    target_modules: str | list[str] = field("all-linear", "layers that get an adapter")


class DataSection(Section):
    source: Literal["clinic", "medhal", "file"] = field("clinic", "where the rows come from")
    path: str = field("", "file or hub id for medhal and file; unused for clinic")
    prompt_template: str = field("Summarise the note.\n\n{context}", "prompt around the note")
    train_size: int = field(3000, "training notes", ge=1)
    validation_size: int = field(200, "validation notes", ge=1)
    test_size: int = field(400, "held-out notes", ge=1)
    missing_rate: float = field(0.3, "share of optional sections missing from a note", ge=0, le=1)
    reference_fill_rate: float = field(
        0.85, "share of missing sections the reference states anyway", ge=0, le=1
    )


class SftSection(Section):
    learning_rate: float = field(2e-3, "peak learning rate", gt=0)
    batch_size: int = field(32, "rows per micro-batch", ge=1)
    gradient_accumulation: int = field(1, "micro-batches per step", ge=1)
    max_steps: int = field(200, "optimiser steps", ge=1)
    warmup_steps: int = field(10, "steps of linear warm-up", ge=0)
    eval_steps: int = field(50, "steps between evaluations", ge=1)
    save_steps: int = field(50, "steps between checkpoints", ge=1)
    weight_decay: float = field(0.0, "AdamW weight decay", ge=0)
    report_to: Literal["tensorboard", "none"] = field("tensorboard", "where curves are logged")


class PairsSection(Section):
    origin: Literal["sampled", "perturbed", "twin"] = field("sampled", "how pairs are made")
    notes: int = field(640, "training notes to sample from", ge=1)
    samples_per_note: int = field(8, "summaries sampled per note", ge=2)
    temperature: float = field(1.0, "sampling temperature", gt=0)
    validation_share: float = field(0.1, "share of pairs held out for validation", gt=0, lt=1)
    judge: Literal["entities"] = field("entities", "detector that ranks the samples")
    judge_false_positive_rate: float = field(0.05, "right statements called wrong", ge=0, le=1)
    judge_false_negative_rate: float = field(0.10, "wrong statements let through", ge=0, le=1)
    batch_size: int = field(64, "summaries generated at a time", ge=1)


class ReferenceSection(Section):
    batch_size: int = field(32, "pairs per forward pass", ge=1)
    shard_size: int = field(256, "pairs per file of the cache", ge=1)
    spot_check_rows: int = field(4, "rows recomputed when the cache is loaded", ge=0)


class DpoSection(Section):
    prefix_sharing: Literal["auto", "off"] = field(
        "auto", "run a prompt once for both completions; auto = where the model can"
    )
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "orpo"] = field(
        "sigmoid", "preference loss; simpo and orpo ask no reference"
    )
    simpo_gamma: float = field(0.5, "margin that simpo asks for", ge=0)
    beta: float = field(0.1, "how far the policy may move from the reference", gt=0)
    label_smoothing: float = field(0.0, "assumed share of flipped pairs", ge=0, lt=0.5)
    sft_weight: float = field(1.0, "weight of the SFT term on the chosen completion", ge=0)
    learning_rate: float = field(1.5e-4, "peak learning rate", gt=0)
    batch_size: int = field(16, "pairs per micro-batch", ge=1)
    gradient_accumulation: int = field(1, "micro-batches per step", ge=1)
    max_steps: int = field(100, "optimiser steps", ge=1)
    warmup_steps: int = field(10, "steps of linear warm-up", ge=0)
    eval_steps: int = field(20, "steps between evaluations", ge=1)
    save_steps: int = field(20, "steps between checkpoints", ge=1)
    weight_decay: float = field(0.0, "AdamW weight decay", ge=0)
    max_grad_norm: float = field(1.0, "gradients are clipped to this norm", gt=0)
    guardrail_notes: int = field(50, "validation notes generated by the guardrail", ge=0)
    guardrail_steps: int = field(20, "steps between guardrail checks", ge=1)
    guardrail_patience: int = field(
        0, "stop after this many guardrail checks without a new best, and keep the best; 0 = never",
        ge=0,
    )
    comparison_arms: list[Literal["dpo_plain", "sft_on_chosen"]] = field(
        ["dpo_plain", "sft_on_chosen"], "arms trained beside DPO for equally many steps"
    )
    report_to: Literal["tensorboard", "none"] = field("tensorboard", "where curves are logged")


class MemorySection(Section):
    card_gb: float = field(12.0, "memory of the card to plan for, in GiB", gt=0)


class EvaluationSection(Section):
    notes: int = field(0, "held-out notes to evaluate; 0 = all", ge=0)
    batch_size: int = field(64, "summaries generated at a time", ge=1)
    max_new_tokens: int = field(160, "longest summary in tokens", ge=1)
    detector: Literal["facts", "entities", "nli"] = field("facts", "detector that reports")
    nli_model: str = field("", "for nli: folder or hub id[@revision] of a sequence classifier")
    force_same_detector: bool = field(
        False, "report with the detector that made the pairs although its figures flatter"
    )


class AssessmentSection(Section):
    items: int = field(20, "summaries to grade", ge=1)
    mode: Literal["single", "ab"] = field("single", "one summary, or two side by side")
    assessor: str = field("me", "name written into the grades")
    repeat_share: float = field(0.1, "share of items shown twice, for self-agreement", ge=0, le=1)


class Recipe(Section):
    """Everything that decides a run. `load_recipe` makes one; it cannot be changed afterwards."""

    name: str = PydanticField(description="name of the recipe; a run folder belongs to one")
    description: str = field("", "one line about it")
    seed: int = field(0, "seed of every random choice", ge=0)
    model: ModelSection = field(ModelSection(), "base model")
    lora: LoraSection = field(LoraSection(), "adapter")
    data: DataSection = field(DataSection(), "notes and references")
    sft: SftSection = field(SftSection(), "supervised fine-tuning")
    pairs: PairsSection = field(PairsSection(), "preference pairs")
    reference: ReferenceSection = field(ReferenceSection(), "cached reference log-probabilities")
    dpo: DpoSection = field(DpoSection(), "direct preference optimisation")
    memory: MemorySection = field(MemorySection(), "memory budget")
    evaluation: EvaluationSection = field(EvaluationSection(), "measurement on held-out notes")
    assessment: AssessmentSection = field(AssessmentSection(), "human assessment")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain, JSON-ready values."""
        return self.model_dump(mode="json")

    def section_hash(self, sections: list[str]) -> str:
        """sha256 of the named sections; the seed always counts."""
        chosen = {name: self.to_dict()[name] for name in sorted(sections)} | {"seed": self.seed}
        return sha256_text(json.dumps(chosen, sort_keys=True))


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a shipped recipe by name, or your own YAML by path, and apply overrides.

    `overrides` may be nested ({"dpo": {"beta": 0.2}}), dotted ({"dpo.beta": 0.2}) or both.
    Raises RecipeError for an unknown recipe, key or value, naming the nearest valid key.
    """
    values = _read_yaml(find_recipe(str(name_or_path)))
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise RecipeError(
            f"overrides must be a dict, got {overrides!r}.",
            "Write {'dpo.beta': 0.2}; with papermill: -y 'overrides: {dpo.beta: 0.2}'.",
        )
    for key, value in overrides.items():
        _merge(values, key.split("."), value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """`["dpo.beta=0.2"]` -> `{"dpo.beta": "0.2"}`; the recipe turns text into the field's type.

    A value that starts with [ or { is read as YAML, so lists can be given too.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"'{assignment}' sets nothing.", "Write key=value, as dpo.beta=0.2.")
        value = text.strip()
        overrides[key.strip()] = yaml.safe_load(value) if value[:1] in ("[", "{") else value
    return overrides


def field_names() -> list[str]:
    """Every valid dotted key of a recipe, sections included."""
    names: list[str] = []
    for name, info in Recipe.model_fields.items():
        names.append(name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            names += [f"{name}.{leaf}" for leaf in info.annotation.model_fields]
    return names


def nearest(name: str, valid: list[str]) -> str | None:
    """The valid name closest to `name`: as a whole, else by its last part alone."""
    close = difflib.get_close_matches(name, valid, n=1)
    if close:
        return close[0]
    leaves = {other.rsplit(".", 1)[-1]: other for other in reversed(valid)}
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1)
    return leaves[close[0]] if close else None


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe, or of your own given by path (RecipeError if neither)."""
    shipped = RECIPES / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    looks_like_path = name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name
    for path in (Path(name).expanduser(), resolve_path(name)) if looks_like_path else ():
        if path.is_file():
            return path
    close = nearest(name, recipe_names())
    hint = f"; did you mean '{close}'?" if close else "."
    raise RecipeError(
        f"There is no recipe '{name}'{hint}",
        f"Use one of {', '.join(recipe_names())}, or the path of your own YAML file.",
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = " ".join(str(error).split())
        what = f"{display_path(path)} is not valid YAML: {place}"
        raise RecipeError(what, "Correct the file.") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{display_path(path)} holds no settings.", "Start from a copy of tiny-cpu.yaml."
        )
    return {"name": path.stem} | values


def _merge(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set one override in place; a dict goes key by key so that it adds to its section."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _merge(values, [*keys, *str(name).split(".")], inner)
        return
    for name in keys[:-1]:
        if not isinstance(values.setdefault(name, {}), dict):
            raise _unknown_key(".".join(keys))
        values = values[name]
    values[keys[-1]] = value


def _unknown_key(key: str) -> RecipeError:
    close = nearest(key, field_names())
    return RecipeError(
        f"Unknown recipe key '{key}'." + (f" Did you mean '{close}'?" if close else ""),
        "Correct the key; `python -m hallulib recipe tiny-cpu` prints all of them.",
    )


def _explain(error: ValidationError) -> RecipeError:
    """The first problem in plain words (unknown keys first, they often cause the others)."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_key(key)
    return RecipeError(
        f"Recipe key '{key}': {first['msg'].lower()}, got {first['input']!r}.",
        f"Give '{key}' a value of the right kind.",
    )
