"""What a batch of episodes says at a glance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rehearsal.errors import EnvironmentFault
from rehearsal.trajectory import Group, StopReason


def check_failures(groups: Sequence[Group], share: float) -> None:
    """Stop where a number over the rest would mean nothing.

    Raises:
        EnvironmentFault: if more than ``share`` of the episodes failed; it tells what the first one said.
    """
    episodes = [trajectory for group in groups for trajectory in group]
    failed = [trajectory for trajectory in episodes if trajectory.failed]
    if len(failed) > share * len(episodes):
        raise EnvironmentFault(
            f"{len(failed)} of {len(episodes)} episodes failed, more than training.abort_failed_share allows; the "
            f"first one: {failed[0].error}"
        )


def rollout_metrics(groups: Sequence[Group], prefix: str = "train") -> dict[str, float]:
    """What a batch of episodes says at a glance: success, reward, lengths, errors and stop reasons."""
    episodes = [trajectory for group in groups for trajectory in group]
    if not episodes:
        return {}
    scored = [trajectory for trajectory in episodes if not trajectory.failed]
    turns = max(1, sum(len(trajectory.turns) for trajectory in episodes))
    metrics = {
        f"{prefix}/episodes": float(len(episodes)),
        f"{prefix}/failed_episodes": float(len(episodes) - len(scored)),
        f"{prefix}/turns": float(np.mean([len(trajectory.turns) for trajectory in episodes])),
        f"{prefix}/response_tokens": sum(trajectory.n_sampled for trajectory in episodes) / turns,
        f"{prefix}/format_errors": sum(t.counters.get("format_errors", 0) for t in episodes) / turns,
        f"{prefix}/illegal_actions": sum(t.counters.get("illegal_actions", 0) for t in episodes) / turns,
    }
    if scored:
        metrics[f"{prefix}/reward"] = float(np.mean([trajectory.reward for trajectory in scored]))
        metrics[f"{prefix}/reward_std"] = float(np.std([trajectory.reward for trajectory in scored]))
        known = [trajectory.success for trajectory in scored if trajectory.success is not None]
        # Where the environment tells success at all, an episode for which it told none has not succeeded.
        if known:
            metrics[f"{prefix}/success"] = sum(bool(value) for value in known) / len(scored)
    for reason in StopReason:
        share = sum(trajectory.stop_reason == reason for trajectory in episodes) / len(episodes)
        if share:
            metrics[f"{prefix}/stop/{reason.value}"] = share
    return metrics
