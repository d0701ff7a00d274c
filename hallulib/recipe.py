"""The recipe: the one configuration of a run, validated; loads recipes/*.yaml or your own."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field as PydanticField
from pydantic import ValidationError

from hallulib.errors import RecipeError
from hallulib.files import display_path, resolve_path, sha256_text
from hallulib.recipe_sections import (
    AssessmentSection,
    DataSection,
    DpoSection,
    EvaluationSection,
    LoraSection,
    MemorySection,
    ModelSection,
    PairsSection,
    ReferenceSection,
    Section,
    SftSection,
    field,
)

RECIPES = Path(__file__).parent / "recipes"


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
