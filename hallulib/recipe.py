"""The recipe: the one configuration of a run, validated; loads recipes/*.yaml or your own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field as PydanticField
from pydantic import ValidationError

from hallulib.errors import RecipeError
from hallulib.files import display_path, resolve_path
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

    name: str = PydanticField(
        description="name of the recipe; a run folder belongs to one", pattern=r"^\w[\w.+ -]*$"
    )
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

    def choose_sections(self, sections: Sequence[str]) -> dict[str, Any]:
        """The named sections and the seed, which always counts, as plain values."""
        return {name: self.to_dict()[name] for name in (*sections, "seed")}


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
    _merge(values, [], overrides)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """`["dpo.beta=0.2"]` -> `{"dpo.beta": "0.2"}`; the recipe turns text into the field's type.

    The value of a field that holds text is taken as it is. Elsewhere a value that starts with [ or
    { is read as YAML, so that lists can be given too.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key, value = key.strip(), text.strip()
        if not equals or not key:
            raise RecipeError(f"'{assignment}' sets nothing.", "Write key=value, as dpo.beta=0.2.")
        if field_types().get(key) is str:
            value = text
        elif value[:1] in ("[", "{"):
            try:
                value = yaml.safe_load(value)
            except yaml.YAMLError:
                advice = "Write a list as [a, b] and a table as {a: b}; mind the shell's quotes."
                raise RecipeError(f"The value of '{assignment}' is not YAML.", advice) from None
        overrides[key] = value
    return overrides


def field_types() -> dict[str, Any]:
    """Every valid dotted key of a recipe, sections included, and the type of its values."""
    types: dict[str, Any] = {}
    for name, info in Recipe.model_fields.items():
        types[name] = info.annotation
        if isinstance(info.default, Section):
            leaves = type(info.default).model_fields.items()
            types |= {f"{name}.{leaf}": inner.annotation for leaf, inner in leaves}
    return types


def nearest(name: str, valid: list[str]) -> str | None:
    """The valid name closest to `name`: as a whole, else by its last part alone."""
    close = difflib.get_close_matches(name, valid, n=1)
    if close:
        return close[0]
    leaves = {other.rsplit(".", 1)[-1]: other for other in reversed(valid)}
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1)
    return leaves[close[0]] if close else None


def name_nearest(name: str, valid: list[str]) -> str:
    """The end of an error message: " Did you mean '...'?", or "" where nothing is close."""
    close = nearest(name, valid)
    return f" Did you mean '{close}'?" if close else ""


def find_recipe(name: str, shipped_only: bool = False) -> Path:
    """The file of a shipped recipe, or of your own given by path (RecipeError if neither)."""
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    looks_like_path = not shipped_only and (name.endswith((".yaml", ".yml")) or "/" in name)
    for path in (Path(name).expanduser(), resolve_path(name)) if looks_like_path else ():
        if path.is_file():
            return path
    raise RecipeError(
        f"There is no recipe '{name}'." + name_nearest(name, recipe_names()),
        f"Use one of {', '.join(recipe_names())}, or the path of your own YAML file.",
    )


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a table with the same key twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            found = f"the key '{sorted(twice)[0]}' stands twice in one table"
            raise yaml.constructor.ConstructorError(None, None, found, node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file, on top of those of the shipped recipe that it `extends`, if any."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = " ".join(str(error).split())
        what = f"{display_path(path)} is not valid YAML: {place}"
        raise RecipeError(what, "Correct the file.") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{display_path(path)} holds no settings.", "Start from a copy of tiny-cpu.yaml."
        )
    base = values.pop("extends", None)
    start = {} if base is None else _read_yaml(find_recipe(str(base), shipped_only=True))
    _merge(start, [], {"name": path.stem} | values)
    return start


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
    return RecipeError(
        f"Unknown recipe key '{key}'." + name_nearest(key, list(field_types())),
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
