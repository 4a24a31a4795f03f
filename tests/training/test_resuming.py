"""A run is taken up as itself, or left as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rehearsal.errors import CheckpointError, RecipeError
from rehearsal.training import loop
from rehearsal.training.loop import Trainer
from rehearsal.training.recipe import Recipe, option_names
from rehearsal.training.resuming import _FREE, changed_options, resumed_recipe
from rehearsal.training.run import train
from rehearsal.training.runs import RunFolder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small: Callable[..., Recipe]) -> Path:
    """A finished run of two steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(small(training__steps=2), output=run)
    return run


def content(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


# What may change


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("environment.name", "bandit"),
        ("environment.params", {"size": 4}),
        ("mixture", [{"name": "frozenlake"}, {"name": "bandit"}]),
        ("curriculum.name", "uniform"),
        ("agent.thinking", True),
        ("agent.max_turns", 2),
        ("tools.names", ["calculator"]),
        ("model.path", "base"),
        ("model.dtype", "bfloat16"),
        ("adapters.policy_rank", 4),
        ("world.mode", "shared"),
        ("sampling.temperature", 0.7),
        ("algorithm.name", "rloo"),
        ("algorithm.options", {"kl_coefficient": 0.1}),
        ("filter.name", "constant"),
        ("rewards.repetition", 0.1),
        ("evaluation.seed", 5),
        ("evaluation.episodes", 5),
        ("evaluation.temperature", 0.0),
        ("seed", 1),
    ],
)
def test_what_would_make_another_run_of_it_is_refused_and_named(option: str, value: Any, finished: Path) -> None:
    before = content(finished)
    with pytest.raises(RecipeError, match=rf"cannot be resumed with another {option} \(") as caught:
        train(output=finished, resume=True, overrides={option: value})
    assert "begin a new run, with --model.path" in str(caught.value)
    assert content(finished) == before


def test_another_recipe_by_name_is_refused_in_python_too(finished: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be resumed with another"):
        train("bandit", output=finished, resume=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("training.steps", 9),
        ("training.learning_rate", 1e-4),
        ("training.pack_tokens", 512),
        ("checkpoint.every", 2),
        ("engine.max_sessions", 6),
        ("trackers", ["tensorboard"]),
        ("diagnostics.every", 0),
        ("evaluation.every", 1),
        ("model.device", "auto"),
        ("environment.workers", 2),
        ("save_trajectories_every", 0),
    ],
)
def test_what_leaves_the_run_itself_may_change(option: str, value: Any, finished: Path) -> None:
    recipe = resumed_recipe(finished, None, {option: value})
    assert changed_options(resumed_recipe(finished), recipe) == [option]


def test_the_same_recipe_may_be_given_again(finished: Path, small: Callable[..., Recipe]) -> None:
    assert resumed_recipe(finished, small(training__steps=5)).training.steps == 5


def test_the_memory_of_the_engine_stays_what_it_was(
    small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to what is free, it would be another at every start, and with it the places and the rounding."""
    recipe = small(training__steps=1, engine__memory_gib=None)
    monkeypatch.setattr("rehearsal.training.playing.free_memory", lambda device: 1 << 30)
    train(recipe, output=tmp_path / "run")
    monkeypatch.setattr("rehearsal.training.playing.free_memory", lambda device: 1 << 31)
    for again in (None, recipe):
        assert resumed_recipe(tmp_path / "run", again).engine.memory_gib == 0.25
    train(output=tmp_path / "run", resume=True, overrides={"training.steps": 2})
    assert resumed_recipe(tmp_path / "run").engine.memory_gib == 0.25


def test_every_option_that_may_change_exists() -> None:
    known = option_names()
    for free in _FREE:
        assert free in known or any(name.startswith(free) for name in known if free.endswith(".")), free


# A resume that fails


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt"])
def test_a_damaged_checkpoint_changes_nothing_in_a_finished_run(file: str, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damaged = run / "checkpoints" / "step_000002" / file
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    before = content(run)
    with pytest.raises(CheckpointError, match="checksum does not match"):
        train(output=run, resume=True, overrides={"training.steps": 3})
    assert content(run) == before
    assert RunFolder.open(run).info.status == "finished"
    assert not RunFolder.open(run).in_use


def test_a_killed_run_is_not_called_failed_because_it_cannot_be_resumed(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "run.json"
    file.write_text(file.read_text().replace('"status": "finished"', '"status": "running"'))
    (run / "checkpoints" / "step_000002" / "weights.safetensors").unlink()
    before = content(run)
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(output=run, resume=True)
    assert content(run) == before


def test_the_state_of_a_run_of_another_kind_is_told_in_a_sentence(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)

    def foreign(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        weights, state = original(path)
        return weights, {name: value for name, value in state.items() if name != "monitor"}

    original = loop.load_checkpoint
    monkeypatch.setattr(loop, "load_checkpoint", foreign)
    with pytest.raises(CheckpointError, match="another version of this package"):
        train(output=run, resume=True)
    assert RunFolder.open(run).info.status == "finished"


def test_what_is_held_is_not_written_to(finished: Path) -> None:
    before = content(finished)
    with RunFolder.hold(finished) as folder:
        assert folder.writable
        with pytest.raises(CheckpointError, match="in use by another run"):
            RunFolder.hold(finished)
    with pytest.raises(ZeroDivisionError), RunFolder.hold(finished):
        raise ZeroDivisionError
    assert content(finished) == before


def test_loading_alone_writes_nothing(finished: Path, small: Callable[..., Recipe]) -> None:
    before = content(finished)
    trainer = Trainer(small(training__steps=2))
    trainer.folder = RunFolder.open(finished)
    trainer.load_newest()
    trainer.close()
    assert trainer.steps_done == 2
    assert content(finished) == before
