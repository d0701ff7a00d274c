"""Recipes: what ships loads, what is mistyped is named, overrides are validated alike."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hallulib.errors import RecipeError
from hallulib.recipe import RECIPES, field_types, load_recipe, nearest, parse_set, recipe_names
from hallulib.recipe_sections import Recipe, Section

pytestmark = pytest.mark.unit


def test_the_four_recipes_ship_under_their_own_names_and_two_fit_12_gb():
    large = ["llama3-8b-12gb", "mistral-7b-12gb"]
    assert recipe_names() == [*large, "qwen2.5-0.5b", "tiny-cpu"]
    for recipe in map(load_recipe, recipe_names()):
        assert Recipe.model_validate(recipe.to_dict()) == recipe
        assert (RECIPES / f"{recipe.name}.yaml").is_file()
    for recipe in map(load_recipe, large):
        assert (recipe.model.quantization, recipe.model.dtype) == ("nf4", "bfloat16")
        assert recipe.memory.card_gb == 12 and recipe.model.gradient_checkpointing


def test_the_default_recipe_states_every_value_of_its_learning_stages():
    """A learner reads the YAML, so that nothing that decides DPO may hide in a default."""
    stated = yaml.safe_load((RECIPES / "tiny-cpu.yaml").read_text())
    assert {"beta", "sft_weight", "learning_rate", "batch_size", "max_steps"} <= set(stated["dpo"])


def test_the_defaults_are_what_the_course_runs_but_for_the_machine():
    """A reader of recipe_sections.py reads the numbers of the default run."""
    tiny, default = load_recipe("tiny-cpu").to_dict(), Recipe(name="x").to_dict()
    differ = {
        f"{section}.{key}"
        for section, values in tiny.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if default[section][key] != value
    }
    assert differ == {"model.device", "pairs.batch_size"}


@pytest.mark.parametrize(
    ("overrides", "named", "suggested"),
    [
        ({"qqqq": 1}, "qqqq", ""),
        ({"dpo.betta": 1}, "dpo.betta", "dpo.beta"),
        ({"dpo": {"betta": 1}}, "dpo.betta", "dpo.beta"),
        ({"beta": 1}, "beta", "dpo.beta"),
        ({"sft.beta": 1}, "sft.beta", "dpo.beta"),
        ({"sft.max_length": 1}, "sft.max_length", "model.max_length"),
        ({"dop.beta": 1}, "dop", "dpo"),
        ({"name.x": 1}, "name.x", "name"),
    ],
)
def test_an_unknown_key_is_named_together_with_the_nearest_valid_one(overrides, named, suggested):
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-cpu", overrides)
    hint = f" Did you mean '{suggested}'?" if suggested else ""
    assert caught.value.what == f"Unknown recipe key '{named}'.{hint}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dpo.beta", "much"),
        ("dpo.beta", 0),
        ("sft.max_steps", 2.5),
        ("model.device", "gpu"),
        ("dpo", 3),
        ("dpo.comparison_arms", ["dpo_fancy"]),
        ("data.missing_rate", 1.5),
        ("seed", None),
    ],
)
def test_a_value_of_the_wrong_kind_names_its_key(key, value):
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny-cpu", {key: value})
    assert f"'{key}" in caught.value.what
    assert repr(value) in caught.value.what or "dpo_fancy" in caught.value.what


def test_nested_and_dotted_overrides_mean_the_same_and_keep_the_rest_of_the_section():
    nested = load_recipe("tiny-cpu", {"dpo": {"beta": 0.2}})
    assert nested == load_recipe("tiny-cpu", {"dpo.beta": 0.2})
    assert nested.dpo.beta == 0.2
    assert nested.dpo == load_recipe("tiny-cpu").dpo.model_copy(update={"beta": 0.2})


def test_text_from_a_command_line_becomes_the_type_of_the_field():
    assignments = ["dpo.beta=5e-6", "sft.max_steps=7", "model.gradient_checkpointing=true"]
    recipe = load_recipe("tiny-cpu", parse_set([*assignments, "dpo.comparison_arms=[dpo_plain]"]))
    assert (recipe.dpo.beta, recipe.sft.max_steps) == (5e-6, 7)
    assert recipe.model.gradient_checkpointing is True
    assert recipe.dpo.comparison_arms == ["dpo_plain"]


def test_overrides_that_arrive_as_text_are_refused_with_the_way_to_pass_them():
    """papermill -p passes everything as text."""
    with pytest.raises(RecipeError, match="papermill: -y"):
        load_recipe("tiny-cpu", "{dpo.beta: 0.2}")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model.revision", "1234567"),
        ("data.prompt_template", "{context} TL;DR"),
        ("data.prompt_template", "[INST] {context} [/INST]"),
        ("data.path", "[a].csv"),
    ],
)
def test_text_for_a_field_of_text_is_taken_as_it_is(key, text):
    section, name = key.split(".")
    recipe = load_recipe("tiny-cpu", parse_set([f"{key}={text}"]))
    assert getattr(getattr(recipe, section), name) == text


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("dpo.beta", "key=value"),
        (" = ", "key=value"),
        ("data.columns={context: a", "'data.columns={context: a' is not YAML"),
    ],
)
def test_an_assignment_that_sets_nothing_or_is_not_yaml_is_refused(assignment, said):
    with pytest.raises(RecipeError, match=said):
        parse_set([assignment])


@pytest.mark.parametrize("name", ["", "..", "a/b", "../../evil", "a\\b", ".hidden", "a\0b"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name):
    with pytest.raises(RecipeError, match="Recipe key 'name'"):
        load_recipe("tiny-cpu", {"name": name})


def test_a_recipe_extends_a_shipped_one_and_states_only_what_differs(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: mistral-7b-12gb\ndpo: {beta: 0.3, learning_rate: 5e-6}\n")
    mine, base = load_recipe(str(path)), load_recipe("mistral-7b-12gb")
    # YAML 1.1 reads 5e-6 as text; a user who writes it means the number.
    assert (mine.name, mine.dpo.beta, mine.dpo.learning_rate) == ("mine", 0.3, 5e-6)
    changed = {"beta": 0.3, "learning_rate": 5e-6}
    assert mine == base.model_copy(
        update={"name": "mine", "dpo": base.dpo.model_copy(update=changed)}
    )
    llama = load_recipe("llama3-8b-12gb")
    assert base.sft == llama.sft and base.model.name_or_path != llama.model.name_or_path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: mistral\n", "no recipe 'mistral'. Did you mean 'mistral-7b-12gb'"),
        ("dpo:\n  beta: 0.1\n  beta: 0.2\n", "mine.yaml.*'beta' stands twice.*line 2"),
        ("dpo: [", "mine.yaml"),
        ("just words", "mine.yaml"),
        ("", "mine.yaml"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(path))


def test_an_unknown_recipe_name_suggests_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'tiny-cpu'"):
        load_recipe("tinycpu")


def test_a_loaded_recipe_cannot_be_changed_and_gives_chosen_sections_with_the_seed():
    recipe = load_recipe("tiny-cpu", {"seed": 3})
    with pytest.raises(ValidationError):
        recipe.dpo.beta = 0.5
    chosen = recipe.choose_sections(["dpo", "model"])
    assert chosen == {"dpo": recipe.dpo.model_dump(), "model": recipe.model.model_dump(), "seed": 3}


def test_every_field_has_a_description_of_one_line():
    sections = [Recipe, *Section.__subclasses__()]
    fields = [info for section in sections for info in section.model_fields.values()]
    assert all(info.description and "\n" not in info.description for info in fields)


@settings(deadline=None)  # a busy machine is no failure
@given(st.sampled_from(list(field_types())), st.data())
def test_one_wrong_letter_still_finds_the_field_or_one_of_its_name(name, data):
    place = data.draw(st.integers(name.rfind(".") + 1, len(name) - 1))
    typo = f"{name[:place]}#{name[place + 1 :]}"
    if len(name.rsplit(".", 1)[-1]) < 5:
        return  # one letter of a very short name is most of it
    found = nearest(typo, list(field_types()))
    assert found is not None and found.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]
