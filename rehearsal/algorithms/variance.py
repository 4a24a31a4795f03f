"""How much the rewards of a group differ: what advantages are made of."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rehearsal.algorithms.advantages import checked_rewards

Mass = Literal["variance", "deviation", "softmax"]
MASSES: tuple[str, ...] = get_args(Mass)


def has_variance(rewards_PG: ArrayLike) -> NDArray[np.bool_]:
    """Whether the rewards of each group differ; the predicate of DAPO's dynamic sampling (arXiv:2503.14476, eq. 11).

    The comparison is exact: a group passes when its largest reward is larger than its smallest. There is no smallest
    standard deviation to get over, which would turn down every group of a task whose rewards are small numbers.

    Args:
        rewards_PG: rewards of P groups of G episodes; NaN for a missing one, which is left out.

    Returns:
        bool of shape (P,); False for a group with fewer than two rewards.
    """
    rewards_PG = checked_rewards(rewards_PG)
    missing_PG = np.isnan(rewards_PG)
    largest_P = np.where(missing_PG, -np.inf, rewards_PG).max(axis=1, initial=-np.inf)
    smallest_P = np.where(missing_PG, np.inf, rewards_PG).min(axis=1, initial=np.inf)
    return np.asarray(largest_P > smallest_P)


def group_variance(rewards_PG: ArrayLike, ddof: int = 0) -> NDArray[np.float64]:
    """In-group variance of the rewards, float64 of shape (P,).

    Exactly 0 where all rewards of a group are equal or fewer than ``ddof + 1`` exist, whatever rounding would say.

    Args:
        rewards_PG: rewards of P groups of G episodes; NaN for a missing one, which is left out.
        ddof: 0 for the population's variance, 1 for the unbiased one.
    """
    rewards_PG = checked_rewards(rewards_PG)
    present_PG = ~np.isnan(rewards_PG)
    count_P = present_PG.sum(axis=1)
    alive_P = has_variance(rewards_PG) & (count_P > ddof)
    filled_PG = np.where(present_PG, rewards_PG, 0.0)
    mean_P = filled_PG.sum(axis=1) / np.maximum(count_P, 1)
    squares_P = (np.where(present_PG, rewards_PG - mean_P[:, None], 0.0) ** 2).sum(axis=1)
    return np.where(alive_P, squares_P / np.maximum(count_P - ddof, 1), 0.0)


def variance_mass(rewards_PG: ArrayLike, mass: Mass = "variance") -> NDArray[np.float64]:
    """The mass of each group, float64 of shape (P,): what ``top_p`` and ``min_p`` count.

    Args:
        rewards_PG: rewards of P groups of G episodes; NaN for a missing one.
        mass: "variance" (the RAGEN-2 paper), "deviation", or "softmax" of the unbiased deviations (the published code).
    """
    if mass == "variance":
        return group_variance(rewards_PG)
    if mass == "deviation":
        return np.sqrt(group_variance(rewards_PG))
    deviations_P = np.sqrt(group_variance(rewards_PG, ddof=1))
    shifted_P = np.exp(deviations_P - deviations_P.max(initial=0.0))
    return shifted_P / max(float(shifted_P.sum()), 1e-300)
