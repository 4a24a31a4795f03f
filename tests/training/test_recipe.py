"""Recipes: every mistake gets one sentence that names the option, and what is written is what is read."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.algorithms.presets import preset
from rehearsal.environments import make
from rehearsal.errors import RecipeError
from rehearsal.training.recipe import (
    Recipe,
    built_in_recipes,
    option_names,
    parse_value,
    read_recipe,
    resolve_recipe,
)


def test_the_defaults_are_a_recipe() -> None:
    assert resolve_recipe() == Recipe()


@pytest.mark.parametrize("name", built_in_recipes())
def test_built_in_recipes_resolve(name: str) -> None:
    recipe = resolve_recipe(name)
    make(recipe.environment.name, **recipe.environment.params).close()
    preset(recipe.algorithm.name, **recipe.algorithm.options)
    assert resolve_recipe(tomllib.loads(recipe.to_toml())) == recipe


def test_there_are_built_in_recipes() -> None:
    assert "frozenlake" in built_in_recipes()


def test_every_option_says_what_it_does() -> None:
    for name, info in option_names().items():
        assert info.description, name


def test_recipes_do_not_share_their_parts() -> None:
    Recipe().training.steps = 5
    Recipe().environment.params["size"] = 9
    assert Recipe().training.steps != 5
    assert Recipe().environment.params == {}


# Overrides


def test_overrides_by_dotted_name() -> None:
    recipe = resolve_recipe("frozenlake", {"training.steps": 7, "environment.params.size": 5, "seed": 3})
    assert (recipe.training.steps, recipe.environment.params, recipe.seed) == (7, {"size": 5}, 3)
    own = resolve_recipe("frozenlake").training.learning_rate
    assert recipe.training.learning_rate == own != Recipe().training.learning_rate


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("training.steps=30", "training.steps", 30),
        ("training.learning_rate=1e-4", "training.learning_rate", 1e-4),
        ("training.learning_rate=1", "training.learning_rate", 1.0),
        ("training.autocast=true", "training.autocast", True),
        ("training.autocast=False", "training.autocast", False),
        ("agent.format_penalty=-0.5", "agent.format_penalty", -0.5),
        ("agent.max_turns=none", "agent.max_turns", None),
        ("model.path=runs/a=b/policy", "model.path", "runs/a=b/policy"),
        ('model.path="30"', "model.path", "30"),
        ("name=2026-11-21", "name", "2026-11-21"),
        ("name=10:30:00", "name", "10:30:00"),
        ('trackers=["wandb", "trackio"]', "trackers", ["wandb", "trackio"]),
        ("trackers=[]", "trackers", []),
    ],
)
def test_overrides_as_text(text: str, name: str, value: Any) -> None:
    found: Any = resolve_recipe(None, [text])
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_free_options_take_any_name_and_depth() -> None:
    recipe = resolve_recipe(
        None,
        [
            "environment.params.size=5",
            "environment.params.view=coordinates",
            "environment.params.deep.er=[1, 2]",
            "algorithm.options.clip_high=0.3",
            "model.template_options.enable_thinking=false",
        ],
    )
    assert recipe.environment.params == {"size": 5, "view": "coordinates", "deep": {"er": [1, 2]}}
    assert recipe.algorithm.options == {"clip_high": 0.3}
    assert recipe.model.template_options == {"enable_thinking": False}


@given(text=st.text(max_size=30))
def test_any_text_is_some_value(text: str) -> None:
    value = parse_value(text)
    assert value is None or isinstance(value, bool | int | float | str | list | dict)


@given(
    text=st.text(alphabet=st.characters(categories=["L"]), min_size=1).filter(
        lambda t: t not in ("true", "false", "none", "True", "False", "inf", "nan")
    )
)
def test_words_stay_words(text: str) -> None:
    assert parse_value(text) == text


def test_an_object_may_be_toml_or_json() -> None:
    wanted = {"source": "tasks.jsonl", "k": {"x": None}}
    assert parse_value('{"source": "tasks.jsonl", "k": {"x": null}}') == wanted
    assert parse_value('{source = "tasks.jsonl"}') == {"source": "tasks.jsonl"}
    assert parse_value('{"source": ') == '{"source": '


def test_one_line_cannot_smuggle_in_another() -> None:
    assert parse_value("1\nother = 2") == "1\nother = 2"


def test_what_was_given_is_left_alone() -> None:
    given_recipe = {"environment": {"params": {"size": 4}}, "trackers": []}
    resolve_recipe(given_recipe, {"environment.params.size": 5, "training.steps": 3})
    assert given_recipe == {"environment": {"params": {"size": 4}}, "trackers": []}


# What is written is what is read


RICH: dict[str, Any] = {
    "name": 'quoted "name" é',
    "model": {"template_options": {"deep": {"er": [1, 2.5, "x"]}, "off": None}},
    "environment": {"name": "bandit", "params": {"reversed": True, "low": 0.1}},
    "agent": {"max_turns": 3, "thinking": False},
    "algorithm": {"name": "ppo", "options": {"dual_clip": None, "value_clip": None, "gamma": 0.99}},
    "engine": {"memory_gib": 0.5},
    "trackers": ["tensorboard"],
}


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    recipe = resolve_recipe(RICH)
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    again = resolve_recipe(file)
    assert again == recipe
    # None is a value of its own where leaving an option out means something else.
    assert again.algorithm.options["dual_clip"] is None
    assert preset("ppo", **again.algorithm.options).objectives == preset("ppo", **recipe.algorithm.options).objectives
    assert preset("ppo", **again.algorithm.options).objectives != preset("ppo", gamma=0.99).objectives


def test_nothing_can_be_written_as_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[algorithm]\nname = "ppo"\n[algorithm.options]\ndual_clip = "none"\n')
    assert resolve_recipe(file).algorithm.options == {"dual_clip": None}
    assert resolve_recipe(None, ["algorithm.options.dual_clip=none"]).algorithm.options == {"dual_clip": None}


# Mistakes


def sentence(source: Any = None, overrides: Any = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.step=3"], "There is no option training.step. Did you mean training.steps?"),
        (["steps=3"], "There is no option steps. Did you mean training.steps?"),
        (["lerning_rate=3"], "There is no option lerning_rate. Did you mean training.learning_rate?"),
        (["xyzzy=3"], "There is no option xyzzy."),
        (["training.steps=0"], "Option training.steps cannot be 0: input should be greater than or equal to 1."),
        (["training.steps=many"], "Option training.steps cannot be 'many': input should be a valid integer."),
        (['training.steps="30"'], "Option training.steps cannot be '30': input should be a valid integer."),
        (["training.steps=true"], "Option training.steps cannot be True: input should be a valid integer."),
        (["training.steps=2.5"], "Option training.steps cannot be 2.5: input should be a valid integer."),
        (["training.steps"], "Option training.steps cannot be '': input should be a valid integer."),
        (["training.steps.more=3"], "Option training.steps cannot be {'more': 3}: input should be a valid integer."),
        (
            ["training.learning_rate=nan"],
            "Option training.learning_rate cannot be nan: input should be a finite number.",
        ),
        (
            ["training.learning_rate=inf"],
            "Option training.learning_rate cannot be inf: input should be a finite number.",
        ),
        (
            ["training.schedule=cosin"],
            "Option training.schedule cannot be 'cosin': input should be 'constant', 'linear' or 'cosine'.",
        ),
        (["training=3"], "There is no option training."),
        (
            ["agent.format_penalty=0.1"],
            "Option agent.format_penalty cannot be 0.1: input should be less than or equal to 0.",
        ),
        (
            ['trackers=["wandbb"]'],
            "Option trackers cannot be ['wandbb']: no tracker 'wandbb'; there are tensorboard, wandb, trackio.",
        ),
        (["name=7"], "Option name cannot be 7: input should be a valid string."),
        (["sampling.temperature=0"], "Training needs sampling.temperature above 0: episodes of a group must differ."),
        (["agent.max_context=64"], "agent.max_context must be larger than agent.max_tokens_per_turn."),
        (
            ["training.groups=1", "training.group_size=2", "training.minibatches=3"],
            "training.minibatches must not exceed the episodes of a step.",
        ),
    ],
)
def test_wrong_options(overrides: list[str], message: str) -> None:
    said = sentence(None, overrides)
    assert said == message or said.startswith(message + " Did you mean")


@pytest.mark.parametrize(("text", "value"), [("1.0", 1.0), ("1", 1), ("0.5", 0.5)])
def test_a_share_stays_a_share(text: str, value: float, tmp_path: Path) -> None:
    """A filter takes 1.0 for all groups and 1 for one."""
    file = tmp_path / "mine.toml"
    file.write_text(f'[filter]\nname = "top_k"\noptions = {{ k = {text} }}')
    typed = resolve_recipe(None, ["filter.name=top_k", f"filter.options.k={text}"])
    for recipe in (resolve_recipe(file), typed, resolve_recipe(tomllib.loads(typed.to_toml()))):
        found = recipe.filter.options["k"]
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["curriculum.low=0.3"],
            "curriculum.low does nothing where curriculum.name is fresh: set curriculum.name to difficulty, or leave "
            "it out.",
        ),
        (
            ["curriculum.name=difficulty", "curriculum.explore=0.3"],
            "curriculum.explore does nothing where curriculum.name is difficulty: set curriculum.name to variance or "
            "progress, or leave it out.",
        ),
        (
            ["curriculum.tasks=4"],
            "curriculum.tasks does nothing where curriculum.name is fresh: set curriculum.name to uniform, difficulty, "
            "variance or progress, or leave it out.",
        ),
    ],
)
def test_options_of_another_curriculum(overrides: list[str], message: str) -> None:
    assert sentence(None, overrides) == message


def test_options_of_a_curriculum_that_reads_them() -> None:
    for name, option in (("difficulty", "low=0.3"), ("variance", "explore=0.3"), ("progress", "tasks=9")):
        resolve_recipe(None, [f"curriculum.name={name}", f"curriculum.{option}"])
    # A recipe that comes with stages can be played without.
    resolve_recipe("lookup", ["curriculum.name=fresh", "curriculum.stages=[]"])
    # The usual values say nothing.
    resolve_recipe(None, ["curriculum.low=0.2", "curriculum.explore=0.1", "curriculum.tasks=512"])


@pytest.mark.parametrize("truncation", ["sampling.top_p=0.9", "sampling.top_k=20"])
def test_truncated_sampling_needs_log_probs_computed_again(truncation: str) -> None:
    assert "set training.old_logprobs to recompute" in sentence(None, [truncation])
    assert resolve_recipe(None, [truncation, "training.old_logprobs=recompute"]).training.old_logprobs == "recompute"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training\nsteps = 3", "is not valid TOML: "),
        ("[trainig]\nsteps = 3", "There is no option trainig. Did you mean training?"),
        ("[training]\nstepps = 3", "There is no option training.stepps. Did you mean training.steps?"),
        ("training = 3", "training is a table of options and cannot be 3; write them below [training]."),
        (
            '[environment]\nparams = "size"',
            "Option environment.params cannot be 'size': input should be a valid dictionary.",
        ),
        ("[training]\nsteps = '3'", "Option training.steps cannot be '3': input should be a valid integer."),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    assert message in sentence(file)


def test_an_override_below_a_value_that_holds_no_options() -> None:
    assert sentence({"training": 3}, ["training.steps=4"]).startswith("training.steps cannot be set: training is 3")
    assert sentence({"model": "base"}, {"model.path": "x"}).startswith("model.path cannot be set: model is 'base'")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert sentence(tmp_path / "missing.toml") == (
        f"There is no recipe {tmp_path / 'missing.toml'}; `rehearsal recipes` lists those that come along."
    )
    assert sentence("frozenlak").endswith("Did you mean frozenlake?")
    assert sentence("no-such").startswith("There is no recipe no-such; there are ")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in sentence(binary)
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    assert "cannot be read" in sentence(folder)


def test_a_file_without_the_usual_ending_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text("seed = 4")
    assert read_recipe(file) == {"seed": 4}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grop", {}, "there is no algorithm 'grop'"),
        ("grpo", {"clip_hi": 0.3}, "has no option 'clip_hi'"),
        ("grpo", {"clip_high": "much"}, "option 'clip_high' must be a number"),
        ("cispo", {"clip_high": 0.3}, "does nothing in 'cispo'"),
    ],
)
def test_what_the_algorithm_refuses(name: str, options: dict[str, Any], message: str) -> None:
    recipe = resolve_recipe({"algorithm": {"name": name, "options": options}})
    with pytest.raises(RecipeError, match=message):
        preset(recipe.algorithm.name, **recipe.algorithm.options)
