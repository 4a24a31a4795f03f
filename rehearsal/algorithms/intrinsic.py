"""A reward from within: how sure the policy is of what it says (Intuitor, arXiv:2505.19590).

Self-certainty of an answer is the mean over its tokens of KL(uniform || p), the distance of the policy's distribution
from knowing nothing:

    -log V - mean_v log p(v)        nats, 0 for a uniform distribution, large for a peaked one

Within a group it says which of several answers the policy would stand by, and needs no environment to say so. It is a
signal of its own, normalised apart before it meets a reward: added to rewards as it is, it would take over wherever all
episodes of a group have the same reward, and there alone.

Published warnings: it improves reasoning for some tens of steps and then feeds on itself, since the surest way to be
sure is to say the same thing always. Watch the entropy and the held-out success, and keep the weight small or the run
short. A run with it has a rule of its own among the verdicts (``sure_and_worse``).

V tokens of the vocabulary, N tokens, P groups, G episodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rehearsal.algorithms.advantages import grpo
from rehearsal.algorithms.credit import one_scale

Integers = NDArray[np.int64]


def mixed_advantages(
    advantages_N: NDArray[np.float32], certainty_N: ArrayLike, episode_N: Integers, sampled_N: NDArray[np.bool_],
    shape: tuple[int, int], present_PG: NDArray[np.bool_], *, weight: float, reward_weight: float,
) -> NDArray[np.float32]:  # fmt: skip
    """Advantages of the reward and of self-certainty, each at a root mean square of 1, and then weighed.

    Args:
        advantages_N: of the reward.
        certainty_N: self-certainty of each token, nats.
        episode_N: row-major index into (P, G) of each token's episode.
        sampled_N: the tokens that the policy sampled: those that certainty is averaged over and that get an advantage.
        shape: (P, G).
        present_PG: the episodes that did not fail.
        weight: of self-certainty.
        reward_weight: of the reward; 0 learns from self-certainty alone.

    Returns:
        float32 of shape (N,), 0 where nothing was sampled or the episode failed.
    """
    certainty_PG = episode_certainty(certainty_N, episode_N, sampled_N, shape)
    inner_PG = grpo(np.where(present_PG, certainty_PG, np.nan))
    inner_N = np.where(sampled_N, inner_PG.reshape(-1)[episode_N], 0.0).astype(np.float32)
    family_N = np.zeros(len(inner_N), dtype=np.int64)
    outer_N = one_scale(advantages_N, family_N, sampled_N)
    inner_N = one_scale(inner_N, family_N, sampled_N)
    return (reward_weight * outer_N + weight * inner_N).astype(np.float32)


def episode_certainty(
    certainty_N: ArrayLike, episode_N: Integers, sampled_N: NDArray[np.bool_], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """Mean self-certainty of the sampled tokens of each episode, float64 of shape (P, G); NaN for one without any."""
    values_N = np.where(sampled_N, np.asarray(certainty_N, dtype=np.float64), 0.0)
    size = shape[0] * shape[1]
    sums = np.bincount(episode_N, weights=values_N, minlength=size)
    counts = np.bincount(episode_N[sampled_N], minlength=size)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, np.nan).reshape(shape)
