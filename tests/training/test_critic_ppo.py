"""The critic, its place in PPO, and the optimiser's schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal.algorithms.presets import preset
from rehearsal.errors import TrainingDiverged
from rehearsal.models.packed import PackedPlan, Span, packed_attention, packed_hidden
from rehearsal.training.critic import Critic
from rehearsal.training.learner import Learner
from rehearsal.training.optimiser import Update, clipped_updates, make_optimiser, scheduled_share
from rehearsal.training.options import TrainingOptions
from rehearsal.trajectory import Group

MakeGroups = Callable[..., list[Group]]


@pytest.fixture
def model(tiny_qwen3: Callable[..., Any]) -> Any:
    return tiny_qwen3(initializer_range=0.2)


def learner_of(model: Any, changes: dict[str, Any] | None = None, **of_algorithm: Any) -> Learner:
    options = TrainingOptions(**{"learning_rate": 1e-3, "critic_learning_rate": 1e-2, "steps": 50, **(changes or {})})
    return Learner(model, preset("ppo", **of_algorithm), options)


def reward_all(groups: list[Group], reward: float) -> None:
    """Every episode gets ``reward``, at its last turn."""
    for group in groups:
        for trajectory in group:
            for turn in trajectory.turns:
                turn.rewards = [0.0]
            trajectory.turns[-1].rewards = [reward]


def values(critic: Critic, ids: torch.Tensor) -> torch.Tensor:
    plan = PackedPlan([Span(0, len(ids))], len(ids))
    with torch.no_grad(), packed_attention(critic):
        return critic.values(packed_hidden(critic, ids, torch.from_numpy(plan.positions_T), plan))


def test_a_new_critic_says_zero_and_is_apart_from_the_policy(model: Any) -> None:
    critic = Critic(model)
    ids = torch.arange(9)
    assert torch.equal(values(critic, ids), torch.zeros(9))
    shared = {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_the_critic_of_an_adapted_policy_is_trained_whole(model: Any) -> None:
    peft = pytest.importorskip("peft")
    critic = Critic(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])))
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert values(critic, torch.arange(5)).shape == (5,)


@pytest.mark.parametrize("advantage", ["gae", "turn_gae", "bi_level_gae"])
def test_values_learn_a_constant_reward(advantage: str, model: Any, make_groups: MakeGroups) -> None:
    """Undiscounted, every state of every episode is worth the reward; then nothing is left for the policy to learn."""
    groups = make_groups(model, spread=0.0)
    reward_all(groups, 0.7)
    learner = learner_of(
        model, advantage=advantage, turn_gamma=1.0, value_clip=None, value_coefficient=1.0, whiten=False
    )
    figures = [learner.step(groups, step) for step in range(40)]
    assert figures[0]["policy/error"] == pytest.approx(-0.7, abs=1e-6)
    assert abs(figures[-1]["policy/error"]) < 0.05
    assert figures[-1]["policy/loss/value"] < 0.02 * figures[0]["policy/loss/value"]
    assert learner.critic is not None
    segment = groups[0].trajectories[0].segments[0]
    if advantage == "gae":
        said = values(learner.critic, torch.from_numpy(segment.token_ids.astype(np.int64)))
        before = np.nonzero(segment.sampled_mask)[0] - 1
        np.testing.assert_allclose(said[before].numpy(), 0.7, atol=0.15)


def test_the_critic_moves_at_its_own_rate_and_the_policy_at_its(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    still = learner_of(copy.deepcopy(model), {"critic_learning_rate": 1e-12})
    assert still.critic is not None
    before = copy.deepcopy(still.critic.state_dict())
    still.step(groups, 0)
    for name, tensor in still.critic.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-9, rtol=0)
    changed = [not torch.equal(a, b) for a, b in zip(still.model.parameters(), model.parameters(), strict=True)]
    assert any(changed)


def test_a_restored_learner_goes_on_as_if_nothing_had_happened(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    first = learner_of(model)
    first.step(groups, 0)
    # What is loaded must not be what is still being changed.
    state = copy.deepcopy(first.state_dict())
    weights = copy.deepcopy(model.state_dict())
    first.step(groups, 1)
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    second = learner_of(other)
    second.load_state_dict(state)
    assert second.updates == 1
    second.step(groups, 1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert first.critic is not None
    assert second.critic is not None
    for name, tensor in first.critic.state_dict().items():
        assert torch.equal(tensor, second.critic.state_dict()[name]), name


# The optimiser


def shares(**changes: Any) -> list[float]:
    options = TrainingOptions(**{"steps": 10, "learning_rate": 1.0, **changes})
    return [scheduled_share(step, options) for step in range(10)]


def test_schedules() -> None:
    assert shares() == [1.0] * 10
    assert shares(warmup_steps=3)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert shares(schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])
    linear = shares(schedule="linear", warmup_steps=2, final_learning_rate=0.2)
    assert linear == pytest.approx([1 / 3, 2 / 3, *(1 - 0.8 * i / 8 for i in range(8))])
    cosine = shares(schedule="cosine", final_learning_rate=0.1)
    assert cosine == pytest.approx([0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])
    # Beyond the last step, as when a run is resumed with fewer steps, it stays where it ended.
    assert scheduled_share(99, TrainingOptions(steps=10, schedule="linear", final_learning_rate=0.2)) == 0.2
    assert max(shares(steps=10, warmup_steps=10)) < 1.0


def test_the_rate_of_a_step_reaches_the_optimiser(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    learner = learner_of(model, {"schedule": "linear", "steps": 4, "learning_rate": 0.01})
    assert learner.critic_optimiser is not None
    for step, share in enumerate((1.0, 0.75, 0.5)):
        figures = learner.step(groups, step)
        assert figures["policy/learning_rate"] == pytest.approx(0.01 * share)
        assert {group["lr"] for group in learner.optimisers["all"].param_groups} == {0.01 * share}
        assert {group["lr"] for group in learner.critic_optimiser.param_groups} == {0.01 * share}


def test_weight_decay_is_for_matrices_alone() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimiser = make_optimiser(layer.parameters(), TrainingOptions(weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in layer.named_parameters()} == {
        "0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0,
    }  # fmt: skip


def sgd(*gradient: float) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter, torch.optim.SGD([parameter], lr=1.0)


def test_gradients_are_scaled_down_to_the_norm() -> None:
    (first, of_first), (second, of_second) = sgd(3.0, 4.0), sgd(0.3, 0.4)
    updates = [Update("policy", of_first, 1.0), Update("critic", of_second, 2.0)]
    assert clipped_updates(updates, 1.0, "step 1") == pytest.approx([5.0, 0.5])
    assert first.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)
    assert second.tolist() == pytest.approx([-0.6, -0.8], rel=1e-5)
    assert first.grad is None
    assert second.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_gradient_stops_all_updates(bad: float) -> None:
    (first, of_first), (second, of_second) = sgd(1.0, 2.0), sgd(bad, 0.0)
    with pytest.raises(TrainingDiverged, match="gradient of the critic at step 7 is not finite"):
        clipped_updates([Update("policy", of_first, 1.0), Update("critic", of_second, 1.0)], 1.0, "step 7")
    assert first.tolist() == second.tolist() == [0.0, 0.0]
    assert first.grad is None
    assert second.grad is None


def test_whether_the_gradient_was_clipped_is_told(model: Any, make_groups: MakeGroups) -> None:
    groups = make_groups(model)
    assert learner_of(copy.deepcopy(model), {"max_grad_norm": 1e-3}).step(groups, 0)["policy/grad_clipped"] == 1.0
    assert learner_of(copy.deepcopy(model), {"max_grad_norm": 1e6}).step(groups, 0)["policy/grad_clipped"] == 0.0
