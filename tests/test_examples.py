"""The examples run, with a tiny model and a few episodes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import rehearsal as rh
from rehearsal import cli
from rehearsal.models.load import save_policy
from rehearsal.training.base_tokenizer import train_tokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--steps", "2", "--groups", "2", "--group-size", "2", "--episodes", "4"]


def load_example(name: str) -> Any:
    """An example as a module, without its ``main`` being run."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(["Left Right Down Up P _ O G"], 300)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    save_policy(Qwen3ForCausalLM(config), tokenizer, folder)
    return folder


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example in the folder that people are told to be in; forgotten afterwards."""
    monkeypatch.chdir(EXAMPLES)
    sys.modules.pop("own_environment", None)
    yield load_example("own_environment")
    sys.modules.pop("own_environment", None)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "own_environment", "own_model", "custom_loop", "evaluate_remote", "lookahead", "early_experience"
    }  # fmt: skip


def test_the_own_environment_is_found_by_name_and_has_no_problems(
    own_environment: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "own_environment:Corridor"]) == 0
    assert "no problems found" in capsys.readouterr().out


def test_the_own_environment_keeps_its_rules(own_environment: ModuleType) -> None:
    env = own_environment.Corridor()
    lengths = set()
    for seed in range(20):
        observation, info = env.reset(seed=seed, options={"split": "test"})
        cells = observation.split(" ")
        distance = cells.index("G") - cells.index("P")
        move = "Right" if distance > 0 else "Left"
        for left in range(abs(distance), 0, -1):
            observation, reward, terminated, _, info = env.step(move.lower())
            assert (reward, terminated, info["success"]) == ((1.0, True, True) if left == 1 else (0.0, False, False))
        assert "G" not in observation
        lengths.add(abs(distance))
    assert max(lengths) <= env.max_turns, "the goal must be within reach"
    env.reset(seed=0)
    for _ in range(9):
        observation, _, terminated, truncated, info = env.step("Left")
        if terminated or truncated:
            break
    assert observation.startswith("P") or info["success"], "the wall holds"


def test_training_in_the_own_environment(own_environment: ModuleType, tiny_model: Path, tmp_path: Path) -> None:
    overrides = {
        "name": "corridor", "environment.name": "own_environment:Corridor", "model.path": str(tiny_model),
        "training.steps": 1, "training.groups": 2, "training.group_size": 2, "evaluation.episodes": 4,
        "agent.max_tokens_per_turn": 8,
    }  # fmt: skip
    run = rh.train("frozenlake", output=tmp_path / "run", overrides=overrides)
    assert run.summary["environment"] == "own_environment:Corridor"
    assert run.summary["steps"] == 1
    assert (run.path / "policy" / "config.json").is_file()


def test_training_in_a_cell_of_a_notebook(own_environment: ModuleType, tiny_model: Path, tmp_path: Path) -> None:
    """There an event loop is running already."""
    overrides = {
        "environment.name": "own_environment:Corridor", "model.path": str(tiny_model), "training.steps": 1,
        "training.groups": 2, "training.group_size": 2, "evaluation.episodes": 4, "agent.max_tokens_per_turn": 8,
    }  # fmt: skip

    async def cell() -> Any:
        return rh.train("frozenlake", output=tmp_path / "run", overrides=overrides)

    assert asyncio.run(cell()).summary["steps"] == 1


def test_own_model_makes_a_model_and_trains_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "own"
    load_example("own_model").main(["--output", str(output), *SMALL])
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
    assert (output / "report.html").is_file()
    assert (tmp_path / "own-model" / "config.json").is_file()
    assert "trained model:" in capsys.readouterr().out


def test_own_model_takes_a_model(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "own"
    load_example("own_model").main(
        ["--output", str(output), "--model", str(tiny_model), "--environment", "bandit", *SMALL]
    )
    assert [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert not (tmp_path / "own-model").exists()


def test_the_custom_loop_changes_the_model(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_example("custom_loop").main(["--model", str(tiny_model), "--environment", "bandit", *SMALL])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [
        "held-out after 0 steps", "step 1", "step 2", "held-out after 2 steps"
    ]  # fmt: skip


def test_looking_ahead_tells_what_came_true(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_example("lookahead").main(["--model", str(tiny_model), "--tasks", "2", "--breadth", "2", "--tokens", "4"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in printed[:2]] == ["task 1: 6 futures", "task 2: 6 futures"]
    assert [line.partition(":")[0] for line in printed[2:]] == ["1 ahead", "2 ahead"]
    assert " of 4 predictions" in printed[2]


def test_what_comes_is_looked_up_in_a_copy() -> None:
    example, env = load_example("lookahead"), rh.make("frozenlake")
    observation, _ = env.reset(seed=0)
    (first, *_), before = env.oracle(), env.describe()
    came = example.what_comes(env, [first])
    assert example.what_comes(env, ["fly"]) is None
    assert env.describe() == before
    assert env.step(first)[0] == came != observation
    assert example.what_comes(env, env.oracle()) is not None
    assert example.what_comes(env, [*env.oracle(), "Up"]) is None, "the episode is over by then"


def test_early_experience_lowers_what_it_learns(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_example("early_experience").main(
        ["--model", str(tiny_model), "--expert-episodes", "4", "--episodes", "4", "--mode", "dual"]
    )
    told = {line.partition(":")[0]: line.partition(":")[2] for line in capsys.readouterr().out.splitlines()}
    before, after = (float(part.split()[0]) for part in told["action_nats"].split(","))
    assert after < before
    assert "success" in told


@pytest.mark.parametrize("name", ["own_model", "custom_loop", "evaluate_remote", "lookahead", "early_experience"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_example(name).main(["--help"])
    assert stop.value.code == 0
    assert "--environment" in capsys.readouterr().out


def test_the_remote_example_asks_for_what_evaluate_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import inspect

    signature = inspect.signature(rh.evaluate)
    asked: dict[str, Any] = {}

    def evaluate(*given: Any, **named: Any) -> dict[str, float]:
        asked.update(signature.bind(*given, **named).arguments)
        rh.resolve_recipe(None, named["overrides"])
        return {"success": 0.5, "success_low": 0.25, "success_high": 0.75, "episodes": 4.0}

    monkeypatch.setattr(rh, "evaluate", evaluate)
    load_example("evaluate_remote").main(["some-model", "--url", "http://localhost:1/v1", "--episodes", "4"])
    assert asked["policy"] == "some-model"
    assert asked["url"] == "http://localhost:1/v1"
    assert "success 50.0% (95% interval 25.0% to 75.0%)" in capsys.readouterr().out
