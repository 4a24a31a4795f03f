"""Which groups teach the policy something.

A filter acts on the policy objective alone: the tokens of a group that it turns down still serve every other objective
(the critic, a world model), so its answer goes into ``TokenBatch.policy_mask_N`` and never into the list of rollouts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rehearsal.algorithms.advantages import checked_rewards


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
