"""From the rewards of episodes to an advantage for every token: the one entry point of the learner.

An episode may lie in several sequences (a trajectory has several segments once its context was rewritten). Credit
follows the episode: its sequences are read one after the other, and the end of a sequence is no boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rehearsal.algorithms import advantages as estimators
from rehearsal.algorithms.advantages import Floats, Integers
from rehearsal.algorithms.reward_parts import OVERLONG
from rehearsal.rewards.groups import normalised_apart

if TYPE_CHECKING:
    from rehearsal.algorithms.presets import AdvantageSettings, Algorithm


@dataclass
class SequenceRewards:
    """The rewards of a step and where they belong, flat over S sequences and N target tokens.

    Pass every sequence of the step, those too that the policy will not learn from: a filter or a cut takes tokens out
    of the policy's mask, not episodes out of a baseline.

    Attributes:
        rewards_PG: float64 of shape (P, G), the reward of each episode; NaN where it failed or does not exist.
        sequence_group_S: int, row of ``rewards_PG`` that each sequence belongs to.
        sequence_sample_S: int, column. Sequences with the same row and column are one episode, in order of time.
        sampled_N: bool, the tokens that the policy sampled; each sampled token stands in one sequence only.
        turns_N: int, turn of the episode that each token belongs to.
        sequence_N: int, sequence that each token belongs to.
        turn_rewards: for each sequence the rewards of all turns of its *episode* (sequences of one episode repeat the
            same array), so ``turn_rewards[s][t]`` is that of turn t as numbered in ``turns_N``. Read by the estimators
            that look at when rewards came; the others read ``rewards_PG``.
        values_N: the critic's value of the state before each token; None without a critic.
        parts: the parts of the rewards by name, each float64 of shape (P, G); read by algorithms that normalise them
            apart.
        policy_S: bool, the sequences that the policy learns from: whitening takes its mean and deviation from these.
            None for all.
        family_S: int, the environment that each sequence was played in: whitening looks at each by itself, as rewards
            of different environments have different scales. None for one.

    Raises:
        ValueError: when the arrays do not fit together.
    """

    rewards_PG: NDArray[np.float64]
    sequence_group_S: NDArray[np.integer]
    sequence_sample_S: NDArray[np.integer]
    sampled_N: NDArray[np.bool_]
    turns_N: NDArray[np.integer]
    sequence_N: NDArray[np.integer]
    turn_rewards: list[NDArray[np.float64]]
    values_N: NDArray[np.floating] | None = None
    policy_S: NDArray[np.bool_] | None = None
    family_S: NDArray[np.integer] | None = None
    parts: Mapping[str, NDArray[np.float64]] | None = None

    def __post_init__(self) -> None:
        self.rewards_PG = estimators.checked_rewards(self.rewards_PG)
        groups, samples = self.rewards_PG.shape
        n_sequences = len(self.sequence_group_S)
        if len(self.sequence_sample_S) != n_sequences or len(self.turn_rewards) != n_sequences:
            raise ValueError("sequence_group_S, sequence_sample_S and turn_rewards must have one length")
        for name, array_S in (("policy_S", self.policy_S), ("family_S", self.family_S)):
            if array_S is not None and len(array_S) != n_sequences:
                raise ValueError(f"{name} must have an entry for every sequence")
        lengths = {len(self.sampled_N), len(self.turns_N), len(self.sequence_N)}
        if self.values_N is not None:
            lengths.add(len(self.values_N))
        if len(lengths) != 1:
            raise ValueError(f"the token arrays must have one length, not {sorted(lengths)}")
        for name, index, size in (
            ("sequence_group_S", self.sequence_group_S, groups),
            ("sequence_sample_S", self.sequence_sample_S, samples),
            ("sequence_N", self.sequence_N, n_sequences),
        ):
            if len(index) and not 0 <= int(np.min(index)) <= int(np.max(index)) < size:
                raise ValueError(f"{name} must lie in 0..{size - 1}")

    @property
    def sequence_episode_S(self) -> Integers:
        """int64: row-major index of each sequence's episode in ``rewards_PG``."""
        columns = self.rewards_PG.shape[1]
        return np.asarray(self.sequence_group_S, dtype=np.int64) * columns + np.asarray(self.sequence_sample_S)

    @property
    def sampled_tokens_PG(self) -> Integers:
        """int64 of shape (P, G): the tokens that the policy sampled in each episode, over all its sequences."""
        episodes_N = self.sequence_episode_S[self.sequence_N]
        counts = np.bincount(episodes_N[self.sampled_N], minlength=self.rewards_PG.size)
        return counts.reshape(self.rewards_PG.shape)


@dataclass
class _Timeline:
    """The sampled tokens of all episodes that have a reward: episode after episode, turn after turn.

    Attributes:
        token_M: where each sampled token stands among the N target tokens.
        episode_tokens_E, episode_turns_E: tokens and turns of each of E episodes.
        turn_tokens_K: tokens of each of K turns.
        turn_rewards_K: reward of each turn.
    """

    token_M: Integers
    episode_tokens_E: Integers
    episode_turns_E: Integers
    turn_tokens_K: Integers
    turn_rewards_K: Floats

    @property
    def turn_ends_K(self) -> Integers:
        """Where the last token of each turn stands among the M sampled tokens."""
        return np.cumsum(self.turn_tokens_K) - 1

    @property
    def turn_starts_K(self) -> Integers:
        return self.turn_ends_K - self.turn_tokens_K + 1

    @property
    def token_rewards_M(self) -> Floats:
        """The reward of each turn on the last token sampled in it."""
        rewards_M = np.zeros(len(self.token_M))
        rewards_M[self.turn_ends_K] = self.turn_rewards_K
        return rewards_M


def _timeline(rewards: SequenceRewards, penalties_PG: Floats) -> _Timeline:
    """Lay out the sampled tokens of the episodes in order of time, with the turns' rewards.

    A turn in which nothing was sampled has no token to carry its reward; it goes to the turn before (or, if there is
    none, to the first turn with a token), so that the rewards of an episode keep their sum. The penalty of an episode
    comes with its last turn.

    Raises:
        ValueError: when the turns of an episode go backwards (a sampled token stands in two sequences), or a token's
            turn has no reward.
    """
    episode_S = rewards.sequence_episode_S
    scored_N = rewards.sampled_N & ~np.isnan(rewards.rewards_PG.reshape(-1))[episode_S[rewards.sequence_N]]
    token_M = np.flatnonzero(scored_N)
    token_M = token_M[np.argsort(episode_S[rewards.sequence_N[token_M]], kind="stable")]
    episode_M = episode_S[rewards.sequence_N[token_M]]
    turn_M = np.asarray(rewards.turns_N, dtype=np.int64)[token_M]

    same_episode = np.diff(episode_M) == 0
    if (np.diff(turn_M)[same_episode] < 0).any():
        raise ValueError("the turns of an episode's sampled tokens go backwards: is a token in two sequences?")
    first_of_turn = np.flatnonzero(np.concatenate(([True], ~same_episode | (np.diff(turn_M) != 0)))[: len(token_M)])
    turn_tokens_K = np.diff(np.append(first_of_turn, len(token_M)))
    episode_K = episode_M[first_of_turn]
    number_K = turn_M[first_of_turn]
    episodes_E, turns_before_E, episode_turns_E = np.unique(episode_K, return_index=True, return_counts=True)

    sequence_of = {int(episode): s for s, episode in reversed(list(enumerate(episode_S)))}
    turn_rewards_K = np.zeros(len(number_K))
    for episode, begin, n_turns in zip(episodes_E, turns_before_E, episode_turns_E, strict=True):
        given = np.asarray(rewards.turn_rewards[sequence_of[int(episode)]], dtype=np.float64)
        numbers = number_K[begin : begin + n_turns]
        if numbers[-1] >= len(given):
            raise ValueError(f"a token belongs to turn {numbers[-1]} of an episode with {len(given)} turn rewards")
        bearer = np.maximum(np.searchsorted(numbers, np.arange(len(given)), side="right") - 1, 0)
        np.add.at(turn_rewards_K, begin + bearer, given)
        turn_rewards_K[begin + n_turns - 1] += penalties_PG.reshape(-1)[episode]
    return _Timeline(token_M, np.bincount(episode_M)[episodes_E], episode_turns_E, turn_tokens_K, turn_rewards_K)


def token_advantages(
    algorithm: Algorithm, rewards: SequenceRewards
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """The advantage of every target token, and the critic's targets.

    Group estimators give all sampled tokens of an episode its group's advantage. Sequential estimators put the reward
    of each turn on the last token sampled in it and leave out the tokens that were not sampled; how credit crosses
    the end of a turn is said in :func:`rehearsal.algorithms.advantages.gae` and ``bi_level_gae``.

    An episode in which nothing was sampled says nothing about the policy: it is left out of its group's baseline.

    Args:
        algorithm: which estimator, its discounts, whether to whiten, and the overlong penalty.
        rewards: of the whole step. Baselines look at all of a group and whitening at all of an environment, so a step
            is never cut before this.

    Returns:
        advantages_N: float32, 0 for tokens that were not sampled and for episodes without a reward.
        returns_N: float32, NaN for tokens without a return; None for estimators without a critic.

    Raises:
        ValueError: when the estimator needs ``values_N`` and there are none, or the turns do not fit.
    """
    how = algorithm.advantage
    lengths_PG = rewards.sampled_tokens_PG
    penalties_PG = np.zeros(rewards.rewards_PG.shape)
    if algorithm.overlong is not None:
        penalties_PG = algorithm.overlong(lengths_PG)
    advantages_N = np.zeros(len(rewards.sampled_N))
    returns_N: Floats | None = None
    policy_S = np.ones(len(rewards.sequence_group_S), dtype=bool) if rewards.policy_S is None else rewards.policy_S

    if not how.is_sequential:
        rewards_PG = np.where(lengths_PG > 0, rewards.rewards_PG + penalties_PG, np.nan)
        if algorithm.parts:
            parts = {**(rewards.parts or {}), OVERLONG: penalties_PG}
            known = {name: np.where(lengths_PG > 0, parts[name], np.nan) for name in algorithm.parts}
            advantages_PG = normalised_apart(known, algorithm.parts, partial(_compared, how))
            advantages_PG = np.where(np.isnan(rewards_PG), 0.0, advantages_PG)
        else:
            advantages_PG = _compared(how, rewards_PG)
        scored_N = rewards.sampled_N & ~np.isnan(rewards_PG.reshape(-1))[rewards.sequence_episode_S[rewards.sequence_N]]
        advantages_N = np.where(
            scored_N, advantages_PG.reshape(-1)[rewards.sequence_episode_S[rewards.sequence_N]], 0.0
        )
    else:
        line = _timeline(rewards, penalties_PG)
        scored_N = np.zeros(len(rewards.sampled_N), dtype=bool)
        scored_N[line.token_M] = True
        advantages_M, returns_M = _sequential(how, line, rewards.values_N)
        advantages_N[line.token_M] = advantages_M
        if returns_M is not None:
            returns_N = np.full(len(rewards.sampled_N), np.nan)
            returns_N[line.token_M] = returns_M

    if how.whitens:
        included_N = scored_N & policy_S[rewards.sequence_N]
        family_S = np.zeros_like(policy_S, dtype=np.int64) if rewards.family_S is None else rewards.family_S
        family_N = np.asarray(family_S)[rewards.sequence_N]
        for family in np.unique(family_N):
            mine_N = family_N == family
            advantages_N[mine_N] = estimators.whiten(advantages_N[mine_N], included_N[mine_N])
        advantages_N = np.where(scored_N, advantages_N, 0.0)
    return advantages_N.astype(np.float32), None if returns_N is None else returns_N.astype(np.float32)


def one_scale(
    advantages_N: NDArray[np.float32], family_N: NDArray[np.integer], included_N: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Advantages divided by their root mean square within each family of tokens.

    Rewards of different environments have different scales; without this the one with the largest numbers would be the
    only one that is learned. Zeros stay zeros, signs stay signs, and nothing is shifted: whether an episode was better
    than its baseline is not for other episodes to say.

    Args:
        advantages_N: of every token.
        family_N: the family of every token.
        included_N: bool, the tokens that the mean is over. A family of which all are zero or none is included is left
            as it is.
    """
    scaled_N = advantages_N.copy()
    for family in np.unique(family_N):
        mine_N = family_N == family
        counted = advantages_N[mine_N & included_N].astype(np.float64)
        size = float(np.sqrt(np.mean(counted**2))) if len(counted) else 0.0
        if size > 0:
            scaled_N[mine_N] = advantages_N[mine_N] / np.float32(size)
    return scaled_N


def _compared(how: AdvantageSettings, rewards_PG: Floats) -> Floats:
    """Advantages by an estimator that compares the episodes of a group."""
    if how.estimator == "grpo":
        return estimators.grpo(rewards_PG, how.eps)
    if how.estimator == "rloo":
        return estimators.rloo(rewards_PG)
    # dr_grpo and reinforce_pp_baseline differ in the whitening that follows
    return estimators.dr_grpo(rewards_PG)


def _sequential(
    how: AdvantageSettings, line: _Timeline, values_N: NDArray[np.floating] | None
) -> tuple[Floats, Floats | None]:
    """Advantages and returns of the sampled tokens, by an estimator that looks at when rewards came."""
    if how.estimator == "reinforce_pp":
        if how.discount_unit == "turn":
            per_turn_K = estimators.returns_to_go(line.turn_rewards_K, line.episode_turns_E, how.turn_gamma)
            return np.repeat(per_turn_K, line.turn_tokens_K), None
        return estimators.returns_to_go(line.token_rewards_M, line.episode_tokens_E, how.gamma), None
    if values_N is None:
        raise ValueError(f"the {how.estimator} estimator needs values_N from a critic")
    values_M = np.asarray(values_N, dtype=np.float64)[line.token_M]
    if how.estimator == "gae":
        return estimators.gae(line.token_rewards_M, values_M, line.episode_tokens_E, how.gamma, how.lam)
    if how.estimator == "bi_level_gae":
        return estimators.bi_level_gae(
            line.turn_rewards_K, values_M, line.turn_tokens_K, line.episode_turns_E, how.gamma, how.lam, how.turn_gamma
        )
    # turn_gae: a turn is one step. Its value stands before its first token, and only there does the critic learn.
    advantages_K, returns_K = estimators.gae(
        line.turn_rewards_K, values_M[line.turn_starts_K], line.episode_turns_E, how.turn_gamma, how.lam
    )
    returns_M = np.full(len(values_M), np.nan)
    returns_M[line.turn_starts_K] = returns_K
    return np.repeat(advantages_K, line.turn_tokens_K), returns_M
