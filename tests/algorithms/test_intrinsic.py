"""Self-certainty: its value, and that it meets the reward on equal terms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rehearsal.algorithms import preset
from rehearsal.algorithms.intrinsic import episode_certainty, mixed_advantages
from rehearsal.errors import RecipeError

EPISODE_N = np.repeat(np.arange(6), 4)  # two groups of three episodes with four tokens each
SAMPLED_N = np.tile([True, True, False, True], 6)


def mixed(advantages_N, certainty_N, weight=1.0, reward_weight=1.0, present=None):
    present_PG = np.ones((2, 3), dtype=bool) if present is None else present
    return mixed_advantages(
        np.asarray(advantages_N, dtype=np.float32), certainty_N, EPISODE_N, SAMPLED_N, (2, 3), present_PG,
        weight=weight, reward_weight=reward_weight,
    )  # fmt: skip


def rewards(rng):
    return np.where(SAMPLED_N, rng.normal(size=6)[EPISODE_N], 0.0)


def test_it_is_averaged_over_sampled_tokens():
    certainty_N = np.arange(24.0)
    means = episode_certainty(certainty_N, EPISODE_N, SAMPLED_N, (2, 3))
    assert means[0].tolist() == [np.mean([0, 1, 3]), np.mean([4, 5, 7]), np.mean([8, 9, 11])]
    nothing = episode_certainty(certainty_N, EPISODE_N, np.zeros(24, dtype=bool), (2, 3))
    assert np.isnan(nothing).all()


def test_scales_do_not_matter_and_weights_do():
    rng = np.random.default_rng(0)
    outer_N, inner_N = rewards(rng), rng.random(24)
    one = mixed(outer_N, inner_N)
    assert np.allclose(one, mixed(1000 * outer_N, 50 * inner_N + 7), atol=1e-4)
    assert not np.allclose(one, mixed(outer_N, inner_N, weight=3.0))
    alone = mixed(outer_N, inner_N, weight=0.0)
    size = np.sqrt(np.mean(outer_N[SAMPLED_N] ** 2))
    assert np.allclose(alone, outer_N / size, atol=1e-5)


def test_without_a_reward_it_compares_the_answers_of_a_group():
    certainty_N = np.array([0.1, 0.2, 0.3, 0.9, 0.5, 0.4])[EPISODE_N]
    found_N = mixed(np.zeros(24), certainty_N, reward_weight=0.0)
    assert (found_N[~SAMPLED_N] == 0).all()
    by_episode = found_N.reshape(6, 4)[:, 0]
    assert by_episode[0] < by_episode[1] < by_episode[2]
    assert by_episode[5] < by_episode[4] < by_episode[3]
    assert np.sqrt(np.mean(found_N[SAMPLED_N] ** 2)) == pytest.approx(1.0, rel=1e-5)


def test_failed_episodes_have_no_part_in_it():
    present_PG = np.array([[True, True, False], [True, True, True]])
    certainty_N = np.arange(6.0)[EPISODE_N]
    found_N = mixed(np.zeros(24), certainty_N, present=present_PG)
    assert (found_N[8:12] == 0).all()
    wild = certainty_N.copy()
    wild[8:12] = 1e6
    assert np.array_equal(found_N, mixed(np.zeros(24), wild, present=present_PG))


def test_certainty_of_a_distribution(tiny_qwen3):
    from rehearsal.models.head import token_certainties

    model = tiny_qwen3()
    hidden_ND = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logprobs_NV = (model.lm_head(hidden_ND) / 0.7).log_softmax(-1)
        wanted_N = (-np.log(97) - logprobs_NV.mean(-1)).numpy()
        found_N = token_certainties(model, hidden_ND, temperature=0.7).numpy()
        assert token_certainties(model, hidden_ND[:0]).shape == (0,)
        flat = token_certainties(model, torch.zeros(3, 32))
    assert np.allclose(found_N, wanted_N, atol=1e-5)
    assert torch.allclose(flat, torch.zeros(3), atol=1e-6)


def test_wrong_options():
    assert preset("grpo", self_certainty=0.5, reward_weight=0.0).self_certainty == 0.5
    with pytest.raises(RecipeError, match="does nothing without 'self_certainty'"):
        preset("grpo", reward_weight=0.5)
    with pytest.raises(RecipeError, match="must not be negative"):
        preset("grpo", self_certainty=-0.5)
    assert "self-certainty" in preset("grpo", self_certainty=0.5).describe()
