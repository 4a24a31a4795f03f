"""Environments by name, and the sentences that wrong names get."""

import gymnasium as gym
import pytest

from rehearsal.environments import GymTextAdapter, TextEnv, make, names, register
from rehearsal.environments import registry as registry_module
from rehearsal.errors import EnvironmentFault, RecipeError


class Echo(TextEnv):
    name = "echo"

    def __init__(self, word="hello"):
        if word == "boom":
            raise KeyError("inside")
        self.word = word

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.word, {}

    def step(self, action):
        return action, 0.0, True, False, {}


class PlainText(gym.Env):
    observation_space = gym.spaces.Text(max_length=10)
    action_space = gym.spaces.Text(max_length=10)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "plain", {}

    def step(self, action):
        return action, 0, True, False, {}


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry_module, "_registered", dict(registry_module._registered))


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's in the present folder, which a console script would not find by itself."""
    (tmp_path / "my_games").mkdir()
    (tmp_path / "my_games" / "__init__.py").write_text("")
    (tmp_path / "my_games" / "coins.py").write_text(
        "from rehearsal.environments import TextEnv\n"
        "class Coins(TextEnv):\n"
        "    def __init__(self, sides=2): self.sides = sides\n"
        "class Nothing: pass\n"
        "number = 3\n"
        "def build(sides): return Coins(sides)\n"
        "def wrong(): return 'text'\n"
    )
    (tmp_path / "my_broken_game.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])


def test_built_in_names():
    assert {"bandit", "countdown", "frozenlake", "reasoning-gym", "sokoban"} <= set(names())
    assert make("frozenlake", size=5).size == 5


def test_own_classes_and_functions(own_module):
    import sys

    before = list(sys.path)
    assert make("my_games.coins:Coins", sides=6).sides == 6
    assert make("my_games.coins:build", sides=3).sides == 3
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "params", "error", "message"),
    [
        ("sokobann", {}, RecipeError, "did you mean sokoban"),
        ("qqqqqq", {}, RecipeError, "there are: bandit"),
        ("sokoban", {"boxs": 2}, RecipeError, "did you mean boxes"),
        ("my_games.coin:Coins", {}, RecipeError, "cannot be imported"),
        ("my_broken_game:Game", {}, RecipeError, "no_such_package_anywhere"),
        ("my_games.coins:Coin", {}, RecipeError, "did you mean Coins"),
        ("my_games.coins:Nothing", {}, EnvironmentFault, r"derive it from rehearsal\.TextEnv"),
        ("my_games.coins:number", {}, EnvironmentFault, "neither a class nor a function"),
        ("my_games.coins:wrong", {}, EnvironmentFault, "which is not an environment"),
        ("my_games.coins:build", {}, RecipeError, "needs the parameter sides"),
        ("my_games.coins:", {}, RecipeError, "package.module:Class"),
        ("..:x", {}, RecipeError, "cannot be imported"),
    ],
)
def test_wrong_names_get_one_clear_sentence(own_module, name, params, error, message):
    with pytest.raises(error, match=message) as caught:
        make(name, **params)
    assert "\n" not in str(caught.value)


def test_registering(clean_registry):
    register("echo", Echo)
    assert make("echo", word="hi").reset()[0] == "hi"
    with pytest.raises(RecipeError, match="already"):
        register("echo", Echo)
    with pytest.raises(RecipeError, match="colon"):
        register("a:b", Echo)
    with pytest.raises(RecipeError, match="neither"):
        register("three", 3)
    with pytest.raises(EnvironmentFault, match="KeyError"):
        make("echo", word="boom")


def test_a_plain_text_environment_is_wrapped(clean_registry):
    register("plain", PlainText)
    env = make("plain")
    assert isinstance(env, GymTextAdapter)
    assert env.reset(seed=1)[0] == "plain"
