"""How much better than expected: advantage estimators, in numpy and in float64.

Two families. *Group* estimators compare the rewards of the episodes of a group, ``rewards_PG`` (P groups of G
episodes), and give every token of an episode the same advantage. *Sequential* estimators look at when the rewards came
and work on flat arrays: ``M`` sampled tokens, episode after episode, cut into runs by explicit lengths. Where a turn
ends is given, never read off the rewards, so a turn whose reward is zero is a turn like any other.

A reward that is NaN is missing: its episode failed, for reasons that are not the agent's. It stays out of every
baseline and its advantage is 0. A reward of 0 is a reward. Infinite rewards are refused.

Groups of one: there is nothing to compare with, so the advantage is 0. verl's GRPO and RLOO take the baseline to be 0
and the deviation to be 1 in this case and train on the raw reward, which lets a task with only positive rewards push up
whatever was sampled.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

WHITEN_EPS = 1e-8
"""Added to the variance in :func:`whiten` (as in verl and in TRL's PPO)."""


def checked_rewards(rewards_PG: ArrayLike) -> Floats:
    """Rewards as float64 of shape (P, G).

    Raises:
        ValueError: for another number of dimensions or an infinite reward.
    """
    rewards_PG = np.asarray(rewards_PG, dtype=np.float64)
    if rewards_PG.ndim != 2:
        raise ValueError(f"rewards_PG must have two dimensions, groups and episodes, not shape {rewards_PG.shape}")
    if np.isinf(rewards_PG).any():
        raise ValueError("a reward is infinite; a missing reward is written as NaN")
    return rewards_PG


def _centred(rewards_PG: ArrayLike) -> tuple[Floats, NDArray[np.bool_], Integers]:
    """Rewards less the mean of their group (exactly 0 where there is nothing to compare), who is in, how many."""
    rewards_PG = checked_rewards(rewards_PG)
    present_PG = ~np.isnan(rewards_PG)
    filled_PG = np.where(present_PG, rewards_PG, 0.0)
    counts_P1 = present_PG.sum(axis=1, keepdims=True)
    means_P1 = filled_PG.sum(axis=1, keepdims=True) / np.maximum(counts_P1, 1)
    # The mean of n equal numbers may differ from them in the last bit, and dividing by the deviation of such a group
    # would make something of that. A group whose rewards are all the same teaches nothing, exactly.
    largest_P1 = np.where(present_PG, rewards_PG, -np.inf).max(axis=1, keepdims=True, initial=-np.inf)
    smallest_P1 = np.where(present_PG, rewards_PG, np.inf).min(axis=1, keepdims=True, initial=np.inf)
    informative_PG = present_PG & (largest_P1 > smallest_P1)
    return np.where(informative_PG, filled_PG - means_P1, 0.0), present_PG, counts_P1


def grpo(rewards_PG: ArrayLike, eps: float = 1e-6) -> Floats:
    """(reward - mean) / (standard deviation + eps) within each group (GRPO, arXiv:2402.03300, section 4.1.2).

    The deviation is the unbiased one (divided by n - 1), as in verl and TRL; eps is verl's (TRL has 1e-4).
    With ``eps=0`` the advantages do not change when all rewards of a group are scaled or shifted; a group of equal
    rewards gives 0 for every eps.
    """
    centred_PG, _, counts_P1 = _centred(rewards_PG)
    # Scaled before squaring, so that rewards of 1e-200 neither underflow to a deviation of 0 nor 1e200 overflow.
    scale_P1 = np.abs(centred_PG).max(axis=1, keepdims=True, initial=0.0)
    scale_P1 = np.where(scale_P1 > 0, scale_P1, 1.0)
    variances_P1 = ((centred_PG / scale_P1) ** 2).sum(axis=1, keepdims=True) / np.maximum(counts_P1 - 1, 1)
    deviations_P1 = scale_P1 * np.sqrt(variances_P1)
    return np.divide(centred_PG, deviations_P1 + eps, out=np.zeros_like(centred_PG), where=centred_PG != 0)


def dr_grpo(rewards_PG: ArrayLike) -> Floats:
    """reward - mean of the group (Dr. GRPO, arXiv:2503.20783, eq. 2): no division by the deviation."""
    return _centred(rewards_PG)[0]


def rloo(rewards_PG: ArrayLike) -> Floats:
    """reward - mean of the *other* rewards of the group (RLOO, arXiv:2402.14740, eq. 8).

    It is n / (n - 1) times :func:`dr_grpo`, with n the rewards that are present: an unbiased baseline.
    """
    centred_PG, _, counts_P1 = _centred(rewards_PG)
    return centred_PG * (counts_P1 / np.maximum(counts_P1 - 1, 1))


def whiten(values_M: ArrayLike, included_M: ArrayLike | None = None) -> Floats:
    """Shift to mean 0 and scale to variance 1, with statistics over the included entries.

    (x - mean) / sqrt(variance + 1e-8), the variance divided by n - 1. Entries that are not included are shifted and
    scaled alike. With fewer than two included entries, or all of them equal, there is no scale to divide by, and
    the values are only shifted.
    """
    values_M = np.asarray(values_M, dtype=np.float64)
    chosen = values_M if included_M is None else values_M[np.asarray(included_M, dtype=bool)]
    if chosen.size == 0:
        return values_M.copy()
    if chosen.max() == chosen.min():
        return values_M - chosen[0]
    return (values_M - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + WHITEN_EPS)


def suffix_sums(values_M: ArrayLike, lengths_K: ArrayLike, factor: float) -> Floats:
    """y_t = x_t + factor * y_{t+1} inside each of K consecutive runs; nothing passes from one run to the next.

    Every sequential estimator is this recursion over some x, some runs and some factor. All runs are worked through at
    once, from their ends: the Python loop is as long as the longest run, the work is that of M additions.

    Args:
        values_M: x, the runs one after the other.
        lengths_K: int, length of each run; they add up to M.

    Raises:
        ValueError: when they do not.
    """
    values_M = np.asarray(values_M, dtype=np.float64)
    lengths_K = np.asarray(lengths_K, dtype=np.int64)
    if int(lengths_K.sum()) != len(values_M):
        raise ValueError(f"runs of {int(lengths_K.sum())} entries do not cover {len(values_M)} values")
    result_M = np.empty_like(values_M)
    longest_first = np.argsort(-lengths_K, kind="stable")
    last_K = (np.cumsum(lengths_K) - 1)[longest_first]
    lengths_K = lengths_K[longest_first]
    carry_K = np.zeros(len(lengths_K))
    for distance in range(int(lengths_K.max(initial=0))):
        alive = int(np.searchsorted(-lengths_K, -distance, side="left"))  # runs longer than `distance`
        at = last_K[:alive] - distance
        carry_K[:alive] = values_M[at] + factor * carry_K[:alive]
        result_M[at] = carry_K[:alive]
    return result_M


def following(values_M: Floats, lengths_K: ArrayLike) -> Floats:
    """The next entry of the same run; 0 after the last."""
    next_M = np.zeros_like(values_M)
    next_M[:-1] = values_M[1:]
    lengths = np.asarray(lengths_K, dtype=np.int64)
    next_M[np.cumsum(lengths)[lengths > 0] - 1] = 0.0
    return next_M


def returns_to_go(rewards_M: ArrayLike, lengths_E: ArrayLike, gamma: float) -> Floats:
    """Discounted sum of the rewards from each step to the end of its episode (REINFORCE++, arXiv:2501.03262).

    Args:
        rewards_M: the reward of each step, E episodes one after the other.
        lengths_E: steps of each episode.
        gamma: discount of one step.
    """
    return suffix_sums(rewards_M, lengths_E, gamma)


def gae(
    rewards_M: ArrayLike, values_M: ArrayLike, lengths_E: ArrayLike, gamma: float, lam: float
) -> tuple[Floats, Floats]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16) over the steps of each episode.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}; V is 0 past the last step. An episode
    that ran into a limit of turns or tokens is not continued by the critic's guess: the limits are part of the task.

    What a step is, the caller decides by what it passes:

    - Sampled tokens (estimator "gae"). Tokens that were not sampled are simply not there, so the step after the last
      token of a turn is the first token of the next one, and the observation in between costs neither a discount nor
      a residual. This is what verl does when it carries value and residual unchanged through masked tokens. Credit
      crosses the end of a turn as it crosses any other token: a reward n sampled tokens away counts (gamma lam)^n, so
      unless gamma = lam = 1 a long answer in a later turn dims what an earlier turn is told.
    - Turns (estimator "turn_gae"). The value of a turn is that of the state before its first sampled token, and a
      reward n turns away counts (gamma lam)^n however long the answers are.

    Returns:
        advantages and returns (advantage + value), float64 of shape (M,), not whitened.
    """
    rewards_M = np.asarray(rewards_M, dtype=np.float64)
    values_M = np.asarray(values_M, dtype=np.float64)
    residuals_M = rewards_M + gamma * following(values_M, lengths_E) - values_M
    advantages_M = suffix_sums(residuals_M, lengths_E, gamma * lam)
    return advantages_M, advantages_M + values_M


def bi_level_gae(
    rewards_K: ArrayLike,
    values_M: ArrayLike,
    turn_lengths_K: ArrayLike,
    episode_turns_E: ArrayLike,
    gamma: float,
    lam: float,
    turn_gamma: float,
) -> tuple[Floats, Floats]:
    """Two levels of GAE: over the turns of an episode, then over the tokens of each turn (VAGEN, RAGEN).

    Turn level, e the last token of a turn and e' that of the next: delta = r_e + turn_gamma V(e') - V(e), V = 0 past
    the last turn, A_e = delta + turn_gamma lam A_e'. Token level, inside a turn only: the last token's advantage is
    A_e, and before it delta_t = gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}. Nothing else crosses the end
    of a turn: the future reaches a turn through A_e alone.

    Deviation from the published code (``compute_bi_level_gae_advantage_return`` in both repositories): turns are given
    by their lengths. There a turn ends where a reward is not zero, so turns of zero reward run into the next one and
    an episode whose last reward is zero ends in an IndexError.

    Args:
        rewards_K: reward of each of K turns, E episodes one after the other.
        values_M: value of the state before each sampled token.
        turn_lengths_K: sampled tokens of each turn, at least 1; they add up to M.
        episode_turns_E: turns of each episode; they add up to K.
        gamma: discount of a token, inside a turn.
        lam: of both levels.
        turn_gamma: discount of a turn.

    Returns:
        advantages and returns (advantage + value), float64 of shape (M,), not whitened.

    Raises:
        ValueError: for a turn without tokens, or lengths that do not add up.
    """
    values_M = np.asarray(values_M, dtype=np.float64)
    turn_lengths_K = np.asarray(turn_lengths_K, dtype=np.int64)
    if (turn_lengths_K < 1).any():
        raise ValueError("every turn must have at least one sampled token")
    ends_K = np.cumsum(turn_lengths_K) - 1
    turn_advantages_K, _ = gae(rewards_K, values_M[ends_K], episode_turns_E, turn_gamma, lam)
    residuals_M = gamma * following(values_M, turn_lengths_K) - values_M
    residuals_M[ends_K] = turn_advantages_K
    advantages_M = suffix_sums(residuals_M, turn_lengths_K, gamma * lam)
    return advantages_M, advantages_M + values_M
