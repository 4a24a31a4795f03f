"""The advantages of a step in which several environments meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal.algorithms.advantages import whiten
from rehearsal.algorithms.credit import one_scale
from rehearsal.algorithms.presets import preset
from rehearsal.training.batching import policy_batch
from rehearsal.training.learner import Learner
from rehearsal.training.options import TrainingOptions
from rehearsal.training.sequences import collect
from rehearsal.trajectory import Group

MakeGroups = Callable[..., list[Group]]
WHITENED = [
    ("reinforce_pp", {}), ("reinforce_pp", {"discount_unit": "turn", "turn_gamma": 1.0}), ("ppo", {}),
    ("ppo", {"advantage": "turn_gae", "turn_gamma": 1.0}), ("grpo", {"advantage": "reinforce_pp_baseline"}),
]  # fmt: skip


def paid(groups: list[Group], amounts: Sequence[float]) -> list[Group]:
    """The same with the first two of four episodes solved, for which each group pays its own amount at the end."""
    for group, amount in zip(groups, amounts, strict=True):
        for number, trajectory in enumerate(group):
            trajectory.success = number < 2
            for turn in trajectory.turns:
                turn.rewards = [0.0]
            trajectory.turns[-1].rewards = [amount if trajectory.success else 0.0]
    return groups


def advantages_of(
    model: Any, groups: list[Group], name: str, options: dict[str, Any], families: list[int] | None, *,
    critic: float = 0.0, keep: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Of the sampled tokens, with the number of each token's episode; every value of the critic is ``critic``."""
    algorithm = preset(name, **options)
    learner = Learner(model, algorithm, TrainingOptions())
    if learner.critic is not None:
        torch.nn.init.constant_(learner.critic.value.bias, critic)
    sequences = collect(groups)
    batch, _ = policy_batch(groups, sequences, algorithm, learner.passes, step=0, families=families, keep=keep)
    episode_S = np.asarray(sequences.group) * len(groups[0]) + np.asarray(sequences.sample)
    return batch.advantages_N.numpy(), episode_S[batch.sequence_N.numpy()]


@pytest.mark.parametrize(("name", "options"), WHITENED)
def test_every_environment_of_a_mixture_is_whitened_by_itself(
    name: str, options: dict[str, Any], tiny_qwen3: Callable[..., Any], make_groups: MakeGroups
) -> None:
    """One pays 10 and the other 1: a success of the second is none the worse for it."""
    model = tiny_qwen3()
    groups = paid(make_groups(model, groups=4, size=4), [10.0, 1.0, 10.0, 1.0])
    families = [0, 1, 0, 1]
    advantages_N, episode_N = advantages_of(model, groups, name, options, families, critic=4.0)
    for family in (0, 1):
        mine_N = np.asarray(families)[episode_N // 4] == family
        solved_N = episode_N % 4 < 2
        assert (advantages_N[mine_N & solved_N] > 0).all()
        assert (advantages_N[mine_N & ~solved_N] < 0).all()
        assert advantages_N[mine_N].mean() == pytest.approx(0.0, abs=1e-6)
        assert np.sqrt((advantages_N[mine_N] ** 2).mean()) == pytest.approx(1.0, rel=1e-5)


def test_an_environment_that_the_policy_does_not_learn_from_moves_no_other(
    tiny_qwen3: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = tiny_qwen3()
    groups = paid(make_groups(model, groups=4, size=4), [10.0, 1.0, 10.0, 1.0])
    keep = np.array([False, True, False, True])
    both_N, episode_N = advantages_of(model, groups, "reinforce_pp", {}, [0, 1, 0, 1], keep=keep)
    alone_N, _ = advantages_of(model, [groups[1], groups[3]], "reinforce_pp", {}, [1, 1])
    assert np.array_equal(both_N[np.isin(episode_N // 4, [1, 3])], alone_N)
    assert np.isfinite(both_N).all()


@pytest.mark.parametrize(("name", "options"), WHITENED)
def test_one_environment_is_whitened_over_the_step(
    name: str, options: dict[str, Any], tiny_qwen3: Callable[..., Any], make_groups: MakeGroups
) -> None:
    model = tiny_qwen3()
    groups = paid(make_groups(model, groups=4, size=4), [10.0, 1.0, 10.0, 1.0])
    raw_N, _ = advantages_of(model, groups, name, {**options, "whiten": False}, None)
    alone_N, _ = advantages_of(model, groups, name, options, None)
    assert alone_N == pytest.approx(whiten(raw_N), rel=1e-5, abs=1e-6)
    # A mixture of one has the same, at a root mean square of 1.
    mixed_N, _ = advantages_of(model, groups, name, options, [0] * 4)
    everything_N = np.ones(len(alone_N), dtype=bool)
    assert np.array_equal(mixed_N, one_scale(alone_N, np.zeros(len(alone_N), dtype=int), everything_N))
