"""Loads the recipe, the one configuration of a run: recipes/*.yaml or your own, and changes to it.

What may stand in it: recipe_sections.py.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hallulib.errors import RecipeError
from hallulib.files import display_path, resolve_path
from hallulib.recipe_sections import Recipe

RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a shipped recipe by name, or your own YAML by path, and apply overrides.

    `overrides` may be nested ({"dpo": {"beta": 0.2}}), dotted ({"dpo.beta": 0.2}) or both.
    Raises RecipeError for an unknown recipe, key or value, naming the nearest valid key.
    """
    values = _read_yaml(_find_recipe(name_or_path))
    if not isinstance(overrides, Mapping | None):
        raise RecipeError(
            f"overrides must be a dict, got {overrides!r}.",
            "Write {'dpo.beta': 0.2}; with papermill: -y 'overrides: {dpo.beta: 0.2}'.",
        )
    _merge(values, [], overrides or {})
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None


def parse_set(assignments: list[str] | None) -> dict[str, Any]:
    """`["dpo.beta=0.2"]` -> `{"dpo.beta": "0.2"}`; the recipe turns text into the field's type.

    For a field that does not hold text, a value that starts with [ or { is read as YAML.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments or []:
        key, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals or not key:
            raise RecipeError(f"'{assignment}' sets nothing.", "Write key=value, as dpo.beta=0.2.")
        overrides[key] = value
        if value[:1] in ("[", "{") and field_types().get(key) is not str:
            try:
                overrides[key] = yaml.safe_load(value)
            except yaml.YAMLError:
                advice = "Write a list as [a, b] and a table as {a: b}; mind the shell's quotes."
                raise RecipeError(f"The value of '{assignment}' is not YAML.", advice) from None
    return overrides


def field_types() -> dict[str, Any]:
    """Every valid dotted key of a recipe, sections included, and the type of its values."""
    types: dict[str, Any] = {}
    for name, info in Recipe.model_fields.items():
        types[name] = info.annotation
        inner = getattr(info.annotation, "model_fields", {})
        types |= {f"{name}.{leaf}": field.annotation for leaf, field in inner.items()}
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


def _find_recipe(name: str) -> Path:
    """The file of a shipped recipe, or of your own given by path (RecipeError if neither)."""
    for path in (RECIPES / f"{name}.yaml", resolve_path(name)):
        if path.is_file():
            return path
    shipped = recipe_names()
    raise RecipeError(
        f"There is no recipe '{name}'." + name_nearest(name, shipped),
        f"Use one of {', '.join(shipped)}, or the path of your own YAML file.",
    )


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a table with the same key twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                found = f"the key '{key}' stands twice in one table"
                raise yaml.constructor.ConstructorError(None, None, found, node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file, on top of those of the recipe that it `extends`, if any."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
        if not isinstance(values, dict):
            raise yaml.YAMLError("it holds no settings")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = " ".join(str(error).split())
        what = f"{display_path(path)} is not a recipe in YAML: {place}"
        raise RecipeError(what, "Correct it, or start from a copy of tiny-cpu.yaml.") from None
    base = values.pop("extends", None)
    start = {} if base is None else _read_yaml(_find_recipe(base))
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
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_key(key)
    return RecipeError(
        f"Recipe key '{key}': {first['msg'].lower()}, got {first['input']!r}.",
        f"Give '{key}' a value of the right kind.",
    )
