"""Several processes play as one does, and trouble in one of them is told."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal.environments import registry
from rehearsal.environments.registry import import_path
from rehearsal.errors import RecipeError, RehearsalError
from rehearsal.models.load import load_policy
from rehearsal.rollout import ProcessRollout, Task, may_share
from rehearsal.training.loop import Trainer
from rehearsal.training.playing import make_processes, make_rollout, processes_for
from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.trajectory import all_trajectories

pytestmark = pytest.mark.slow
TASKS = [Task(seed) for seed in (3, 1, 4, 1, 5)]


def recipe_of(**options: Any) -> Recipe:
    return resolve_recipe(
        None,
        {
            "environment.name": "frozenlake", "agent.max_tokens_per_turn": 48, "agent.max_context": 512,
            "training.groups": 4, "training.group_size": 2, "training.steps": 1, "evaluation.episodes": 6,
            "evaluation.every": 0, **options,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> Any:
    return load_policy("base", device="cpu")


@pytest.fixture
def players(policy: Any) -> Iterator[ProcessRollout]:
    made = make_processes(recipe_of(), policy, 2)
    yield made
    made.close()


def test_they_play_what_one_process_plays_with_the_weights_of_now(policy: Any, players: ProcessRollout) -> None:
    alone = make_rollout(recipe_of(), policy)
    heard: list[Any] = []
    for scale in (1.0, 1.02):
        with torch.no_grad():
            policy.model.get_input_embeddings().weight.mul_(scale)
        try:
            expected = all_trajectories(alone.play(TASKS, 3, step=2))
            heard.clear()
            played = players.play(TASKS, 3, step=2, on_episode=heard.append)
        finally:
            with torch.no_grad():
                policy.model.get_input_embeddings().weight.div_(scale)
        assert [len(group) for group in played] == [3] * 5
        assert len(heard) == 15
        for one, other in zip(all_trajectories(played), expected, strict=True):
            assert (one.seed, one.sample, one.policy_step, one.task) == (other.seed, other.sample, 2, other.task)
            assert np.array_equal(one.segments[0].token_ids, other.segments[0].token_ids)
            assert np.allclose(one.segments[0].logprobs, other.segments[0].logprobs, atol=1e-4, equal_nan=True)
            assert one.reward == other.reward


def test_a_process_that_is_killed_is_told(players: ProcessRollout) -> None:
    os.kill(players._workers[1]._process.pid, signal.SIGKILL)
    with pytest.raises(RehearsalError, match=r"killed by signal 9; set engine\.processes to 1"):
        players.play(TASKS, 2)
    players.close()
    assert all(worker._process.poll() is not None for worker in players._workers)


def test_what_goes_wrong_while_they_begin_is_told(policy: Any) -> None:
    with pytest.raises(RehearsalError, match="no room for an answer"):
        make_processes(recipe_of(**{"agent.max_context": 100}), policy, 2)


class TwoWordsError(RehearsalError):
    """Cannot be made again from its message alone, so it does not survive the way between two processes."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def _make_that_fails() -> Any:
    raise TwoWordsError("no", "luck")


def test_an_answer_that_cannot_be_read_leaves_nobody_waiting(policy: Any) -> None:
    with pytest.raises(RehearsalError, match="cannot be read"):
        ProcessRollout(_make_that_fails, policy.model, 1)


def test_a_trainer_uses_them_and_lets_them_go() -> None:
    trainer = Trainer(recipe_of(**{"engine.processes": 2}))
    summary = trainer.run()
    assert summary["steps"] == 1
    assert summary["episodes"] == 6.0
    assert trainer._player is None


def test_who_may_be_shared(policy: Any) -> None:
    from peft import LoraConfig, get_peft_model

    assert may_share(policy.model)
    # Adapters that can be multiplied into the weights are no hindrance; others are.
    other = load_policy("base", device="cpu").model
    assert may_share(get_peft_model(other, LoraConfig(target_modules=["q_proj"])))
    other = load_policy("base", device="cpu").model
    assert not may_share(get_peft_model(other, LoraConfig(target_modules=["q_proj"], use_dora=True)))
    assert not may_share(load_policy("base", device="cpu").model.to(torch.bfloat16))


def test_how_many_by_default(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    long = {"training.groups": 32, "training.group_size": 8, "training.steps": 40}
    assert processes_for(recipe_of(**long), policy) == 3
    assert processes_for(recipe_of(), policy) == 1
    assert processes_for(recipe_of(**{**long, "engine.processes": 1}), policy) == 1
    monkeypatch.setitem(registry._registered, "a-lambda", lambda: None)
    assert processes_for(recipe_of(**{**long, "environment.name": "a-lambda"}), policy) == 1
    with pytest.raises(RecipeError, match=r"engine\.processes to 1"):
        processes_for(recipe_of(**{"engine.processes": 2, "environment.name": "a-lambda"}), policy)


def test_paths_that_another_process_can_import() -> None:
    assert import_path("frozenlake") == "rehearsal.environments.frozenlake:FrozenLake"
    assert import_path("some.module:Class") == "some.module:Class"
    assert import_path("__main__:Class") is None
    with pytest.raises(RecipeError, match="bandi"):
        import_path("bandid")
