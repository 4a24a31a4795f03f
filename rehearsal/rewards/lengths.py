"""Rewards for length, as numbers: each takes lengths and gives what is added to the rewards.

All of them change rewards *within* a group, so they make gradients in groups whose answers are all right or all wrong,
which without them teach nothing. What that does to advantages that are normalised within a group is told at each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rehearsal.errors import RewardError

Floats = NDArray[np.float64]


def overlong_penalty(lengths: ArrayLike, max_tokens: int, cache_tokens: int) -> Floats:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13).

    0 up to ``max_tokens - cache_tokens``, then falling linearly to -1 at ``max_tokens``, and -1 beyond.

    Group-normalised: where no answer reaches the last stretch it changes nothing. Where one of an otherwise equal group
    does, by however little, dividing by the standard deviation blows that up to the full (G - 1) / sqrt(G) of a lone
    failure; without the division the advantage keeps the size of the penalty.

    Args:
        lengths: tokens of each answer.
        max_tokens: from which on the penalty is whole.
        cache_tokens: the stretch below it over which the penalty grows, from 1 to ``max_tokens``.

    Returns:
        between -1 and 0, of the shape of ``lengths``.

    Raises:
        RewardError: for a stretch out of range.
    """
    if not 0 < cache_tokens <= max_tokens:
        raise RewardError(
            "the overlong penalty needs cache_tokens between 1 and max_tokens, "
            f"not cache_tokens={cache_tokens} with max_tokens={max_tokens}"
        )
    free = max_tokens - cache_tokens
    return np.clip((free - np.asarray(lengths, dtype=np.float64)) / cache_tokens, -1.0, 0.0)


def kimi_length_reward(lengths_PG: ArrayLike, passed_PG: ArrayLike) -> Floats:
    """Kimi k1.5's length reward (arXiv:2501.12599, section 2.3.3), to be weighted and added.

    With lambda = 0.5 - (length - min) / (max - min) over the group: a right answer gets lambda, a wrong one
    min(0, lambda). So among right answers the shorter ones win, and a wrong one gains nothing by being short. In a
    group whose answers are all of one length everything is 0.

    The scale is the spread of the group, so a difference of one token counts as much as one of a thousand. Group-
    normalised: an all-right group, which taught nothing, now teaches brevity with full strength whatever the weight,
    if the standard deviation is divided by; start it only once answers are right, or do not divide.

    Args:
        lengths_PG: tokens of the answers of P groups of G; NaN where an episode failed, which is then left out.
        passed_PG: whether each is right; what stands where an episode failed does not matter.

    Returns:
        float64 of shape (P, G), between -0.5 and 0.5; NaN where an episode failed.
    """
    lengths_PG = np.asarray(lengths_PG, dtype=np.float64)
    passed_PG = np.broadcast_to(np.asarray(passed_PG, dtype=bool), lengths_PG.shape)
    missing_PG = np.isnan(lengths_PG)
    smallest_P1 = np.where(missing_PG, np.inf, lengths_PG).min(axis=-1, keepdims=True, initial=np.inf)
    largest_P1 = np.where(missing_PG, -np.inf, lengths_PG).max(axis=-1, keepdims=True, initial=-np.inf)
    spread_P1 = largest_P1 - smallest_P1
    with np.errstate(invalid="ignore"):
        share_PG = np.where(spread_P1 > 0, (lengths_PG - smallest_P1) / np.where(spread_P1 > 0, spread_P1, 1.0), 0.5)
    reward_PG = np.where(passed_PG, 0.5 - share_PG, np.minimum(0.0, 0.5 - share_PG))
    return np.where(missing_PG, np.nan, reward_PG)


def cosine_length_reward(
    lengths: ArrayLike, passed: ArrayLike, max_tokens: int, *, right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5), exceeded: float | None = None,
) -> Floats:  # fmt: skip
    """The cosine reward (arXiv:2502.03373), in place of a reward of 1 or 0.

    Along half a cosine from one value at length 0 to another at ``max_tokens``: right answers lose with length, wrong
    ones gain, since they should think longer. The defaults are those of open-r1; the paper has right (2, 1), wrong
    (-10, 0) and -10 for answers that exceed the limit.

    Group-normalised: in an all-wrong group the longest answer has the best advantage, so a policy that solves nothing
    is taught to be long; the repetition penalty of the paper belongs with it.

    Args:
        lengths: tokens of each answer.
        passed: whether each is right; of the same shape.
        max_tokens: length at which the second value is reached; it stays beyond.
        right, wrong: values at length 0 and at ``max_tokens``.
        exceeded: value of an answer of ``max_tokens`` or more, which was cut off; None to make no difference.

    Raises:
        RewardError: for a limit below 1.
    """
    if max_tokens < 1:
        raise RewardError(f"max_tokens of the cosine reward must be 1 or more, not {max_tokens}.")
    lengths = np.asarray(lengths, dtype=np.float64)
    passed = np.asarray(passed, dtype=bool)
    along = (1.0 + np.cos(np.pi * np.clip(lengths / max_tokens, 0.0, 1.0))) / 2.0
    begin, end = (np.where(passed, a, b) for a, b in zip(right, wrong, strict=True))
    rewards = end + (begin - end) * along
    if exceeded is None:
        return rewards
    return np.where(lengths >= max_tokens, exceeded, rewards)
