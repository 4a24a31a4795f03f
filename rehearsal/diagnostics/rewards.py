"""What the rewards of a batch say about the learning signal, before any gradient."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rehearsal.algorithms.variance import group_variance, has_variance
from rehearsal.trajectory import Group, rewards_matrix


def signal_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How many groups can teach the policy anything, and by how much their rewards differ.

    ``signal/dead_groups``: share of the groups with any reward whose rewards are all equal, and of these by cause
    ``signal/dead_groups_solved`` (every episode succeeded), ``signal/dead_groups_failed`` (none did) and
    ``signal/dead_groups_equal`` (equal scores with successes and failures, or where success is not known).
    ``signal/reward_std_in_group``: mean of the groups' standard deviations; 0 for dead ones.
    ``signal/variance_mean`` and ``signal/variance_q10``, ``_q25``, ``_q50``, ``_q75``, ``_q90``: of in-group variances.
    ``signal/variance_spread``: standard deviation of the in-group variances over their mean, which in the published
    runs told whether a filter on variance would help.
    All of these are missing where groups have one episode each: there is nothing to compare, and nothing is wrong.
    ``signal/success_correlation``: correlation of reward and success inside groups, over all of them together: what
    advantages have to do with success. Missing where one of the two does not vary inside any group.
    """
    if groups and all(len(group) == 1 for group in groups):
        return {}
    rated = [group for group in groups if not np.isnan(group.rewards).all()]
    if not rated:
        return {}  # that all have failed has a figure of its own
    rewards_PG = rewards_matrix(rated)
    alive_P = has_variance(rewards_PG)
    variance_P = group_variance(rewards_PG)
    causes = [_cause(group) for group, alive in zip(rated, alive_P, strict=True) if not alive]
    mean = float(variance_P.mean())
    figures = {
        "signal/dead_groups": float(1 - alive_P.mean()),
        "signal/dead_groups_solved": causes.count("solved") / len(rated),
        "signal/dead_groups_failed": causes.count("failed") / len(rated),
        "signal/dead_groups_equal": causes.count("equal") / len(rated),
        "signal/reward_std_in_group": float(np.sqrt(variance_P).mean()),
        "signal/variance_mean": mean,
    }
    for percentile in (10, 25, 50, 75, 90):
        figures[f"signal/variance_q{percentile}"] = float(np.quantile(variance_P, percentile / 100))
    if mean > 0:
        figures["signal/variance_spread"] = float(variance_P.std() / mean)
    correlation = _success_correlation(rated)
    if correlation is not None:
        figures["signal/success_correlation"] = correlation
    return figures


def _success_correlation(groups: Sequence[Group]) -> float | None:
    rewards, outcomes = [], []
    for group in groups:
        known = [one for one in group if not one.failed and one.success is not None]
        if len(known) > 1:
            # Distances to the group's mean: that some tasks are easier says nothing about what is paid for.
            own = np.array([[one.reward, float(bool(one.success))] for one in known])
            rewards.append(own[:, 0] - own[:, 0].mean())
            outcomes.append(own[:, 1] - own[:, 1].mean())
    if not rewards:
        return None
    reward_N, outcome_N = np.concatenate(rewards), np.concatenate(outcomes)
    scale = float(np.sqrt((reward_N**2).sum() * (outcome_N**2).sum()))
    return float((reward_N * outcome_N).sum() / scale) if scale > 1e-9 else None


def _cause(group: Group) -> str:
    """Why all rewards of a group are equal."""
    outcomes = [trajectory.success for trajectory in group if not trajectory.failed]
    known = [outcome for outcome in outcomes if outcome is not None]
    if not known:
        return "equal"
    # Where the environment tells success at all, an episode for which it told none has not succeeded.
    solved = sum(bool(outcome) for outcome in outcomes)
    return "solved" if solved == len(outcomes) else "failed" if solved == 0 else "equal"
