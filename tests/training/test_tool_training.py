"""Tools in a recipe: options, the plan, a step of training from end to end, and what cannot be."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rehearsal import cli
from rehearsal.agents import toolkit
from rehearsal.agents.tools import tool_from
from rehearsal.environments import make
from rehearsal.errors import RecipeError, ToolError
from rehearsal.models.load import load_policy, save_policy
from rehearsal.training.early_experience import EarlySettings, early_experience
from rehearsal.training.plan import describe_plan
from rehearsal.training.playing import episode_limits, make_rollout, make_toolkit, policy_of, processes_for
from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.training.run import train
from rehearsal.training.trajectory_store import read_trajectories
from rehearsal.trajectory import ToolCall

MakeRecipe = Callable[..., Recipe]
TOOLS: dict[str, Any] = {
    "tools__names": ["calculator", "search"], "tools__max_calls": 3, "tools__cost": 0.01,
    "agent__max_context": 1500, "training__steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def roomy_folder(tmp_path_factory: pytest.TempPathFactory, base_tokenizer: Any, tiny_qwen3: Callable[..., Any]) -> Path:
    """A model with random weights and room for the rules of several tools."""
    model = tiny_qwen3(
        len(base_tokenizer), seed=5, eos_token_id=base_tokenizer.eos_token_id, max_position_embeddings=2048
    )
    folder = tmp_path_factory.mktemp("models") / "roomy"
    save_policy(model, base_tokenizer, folder)
    return folder


@pytest.fixture
def recipe(small: MakeRecipe, tmp_path: Path, roomy_folder: Path) -> MakeRecipe:
    """A small recipe with a calculator and search over two documents."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"id": i, "text": f"holes {i}"}) for i in range(2)))

    def build(**changes: Any) -> Recipe:
        given = {
            **TOOLS,
            "model__path": str(roomy_folder),
            "tools__options": {"search": {"corpus": str(corpus)}},
            **changes,
        }
        return small(**{name: value for name, value in given.items() if value is not None})

    return build


def test_options_become_tools_and_limits(recipe: MakeRecipe) -> None:
    made = recipe(tools__per_tool={"search": 1}, tools__timeout=3.0)
    kit = make_toolkit(made)
    box = kit.open(made_env(made))
    assert box is not None
    assert list(box.tools) == ["calculator", "search", "open"]
    limits = box.limits
    assert (limits.max_calls, dict(limits.per_tool), limits.cost, limits.timeout) == (3, {"search": 1}, 0.01, 3.0)
    kit.close()
    again = resolve_recipe(read_toml(made))
    assert again.tools == made.tools


def made_env(recipe: Recipe) -> Any:
    return make(recipe.environment.name, **recipe.environment.params)


def read_toml(recipe: Recipe) -> dict[str, Any]:
    return tomllib.loads(recipe.to_toml())


def test_calls_get_turns_of_their_own(recipe: MakeRecipe) -> None:
    (limits,) = episode_limits(recipe(agent__max_turns=5))
    assert (limits.max_turns, limits.max_actions) == (5, 5 * limits.max_actions_per_turn)
    own = resolve_recipe({"environment": {"name": "countdown"}})
    with_tools = resolve_recipe(
        {"environment": {"name": "countdown"}, "tools": {"names": ["calculator"], "max_calls": 3}}
    )
    (before,), (after,) = episode_limits(own), episode_limits(with_tools)
    assert after.max_turns == before.max_turns + 3
    assert after.max_actions == before.max_actions


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tools__names": ["calculater"], "tools__options": {}}, "did you mean calculator"),
        ({"tools__per_tool": {"serach": 2}}, "did you mean search"),
        ({"tools__options": {"search": {"corpus": "nowhere.jsonl"}}}, "cannot be read"),
        ({"tools__options": {"search": {"corpse": "x"}}}, "did you mean corpus"),
    ],
)
def test_tools_that_cannot_be_made(recipe: MakeRecipe, changes: dict[str, Any], told: str) -> None:
    with pytest.raises((ToolError, RecipeError), match=told):
        make_toolkit(recipe(**changes))


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        ({"options": {"search": {}}}, "tools.names does not name"),
        ({"names": ["search"], "options": {"search": 3}}, "table of options"),
        ({"per_tool": {"search": 0}}, "1 or more"),
        ({"names": ["search", "search"]}, "twice"),
        ({"max_calls": 0}, "max_calls"),
        ({"cost": -1.0}, "cost"),
        ({"nmaes": []}, "Did you mean"),
    ],
)
def test_options_that_cannot_be_used(tools: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        resolve_recipe({"tools": tools})


def test_the_plan_shows_the_tools(recipe: MakeRecipe) -> None:
    text = describe_plan(recipe(tools__per_tool={"search": 1}))
    assert "tools, at most 3 calls an episode, 4 an answer, 1 of search, 0.01 off the reward for each, 10 s" in text
    assert "  calculator(expression: string): Works out an arithmetic expression" in text
    assert "  open(document: string, page: integer = 1): Reads a document." in text
    assert "tools" not in describe_plan(recipe(tools__names=None, tools__options=None, tools__max_calls=None))


def test_a_run_with_tools(recipe: MakeRecipe, tmp_path: Path) -> None:
    result = train(recipe(world__mode="shared"), output=tmp_path / "run")
    file, *_ = sorted((result.path / "trajectories").glob("train_*.parquet"))
    groups = read_trajectories(file)
    for group in groups:
        for trajectory in group:
            assert trajectory.counters["tool_calls/search"] == 0.0
            assert "3 tool calls left" in trajectory.turns[0].notice
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    shown = [row for row in rows if "train/tools/calculator/used" in str(row)]
    assert shown, "the figures of the tools are among the metrics"


def test_a_run_whose_search_has_embeddings(
    recipe: MakeRecipe, encoder_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dry run of a file, its tools, and a step: what the recipe says of embeddings gets to the tool."""
    file = tmp_path / "recipe.toml"
    options = {**recipe().tools.options["search"], "embeddings": str(encoder_folder("bert")), "pooling": "last",
               "cache": str(tmp_path / "cache")}  # fmt: skip
    made = recipe(tools__options={"search": options}, training__steps=1)
    file.write_text(made.to_toml(), encoding="utf-8")
    assert cli.main(["train", str(file), "--dry-run"]) == 0
    assert "search(query: string)" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with contextlib.closing(make_toolkit(made)) as kit:
        box = kit.open(made_env(made))
        assert box is not None
        assert box.execute(ToolCall("search", {"query": "hoels"})).text.startswith("[")
        assert box.execute(ToolCall("search", {"query": " "})).text == "Nothing was found; try other words."
    result = train(made, output=tmp_path / "run")
    assert "embeddings" in (result.path / "recipe.toml").read_text()
    file.write_text(file.read_text(encoding="utf-8").replace('"last"', '"first"'), encoding="utf-8")
    assert cli.main(["train", str(file), "--dry-run"]) == 2
    assert "There is no pooling 'first'" in capsys.readouterr().err


def test_only_tools_that_others_can_find_are_played_in_processes(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolkit, "_registered", dict(toolkit._registered))
    made = recipe(engine__processes=2)
    policy = policy_of(made)
    assert processes_for(made, policy) == 2
    toolkit.register_tool("here", tool_from(lambda: "", name="here", description="Of this function."))
    with pytest.raises(RecipeError, match="tools that can be imported"):
        processes_for(recipe(engine__processes=2, tools__names=["here"], tools__options={}), policy)


def test_early_experience_knows_no_tools(recipe: MakeRecipe, roomy_folder: Path) -> None:
    with pytest.raises(RecipeError, match="no expert calls tools"):
        early_experience(load_policy(roomy_folder, device="cpu"), recipe(), EarlySettings(reflect=False))


def test_a_rollout_gives_its_tools_back(recipe: MakeRecipe) -> None:
    made = recipe()
    rollout = make_rollout(made, policy_of(made))
    corpus = rollout.toolkit.sources[1].corpus  # type: ignore[attr-defined]
    rollout.close()
    with pytest.raises(Exception, match="closed"):
        corpus.search("holes")
