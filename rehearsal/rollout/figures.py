"""What a batch of episodes says at a glance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rehearsal.errors import EnvironmentFault
from rehearsal.trajectory import Group, StopReason, Trajectory

_CALLS, _FAILURES = "tool_calls/", "tool_failures/"


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


def tool_metrics(episodes: Sequence[Trajectory], prefix: str = "train") -> dict[str, float]:
    """Figures of each tool that the agents had, also of those that nobody called; none where there were no tools.

    ``PREFIX/tools/NAME/calls``: calls an episode, of the episodes that had the tool. ``failures``: share of the calls
    that failed; left out without calls. ``used``: share of the episodes that called it. ``success_with`` and
    ``success_without``: success of those that called it and of those that did not, where success is known; a comparison
    of what the agent chose, not of what the tool does. ``PREFIX/tools/calls``, ``unknown``, ``refused``, ``surplus``:
    calls of all tools an episode, and those of tools that there are not, beyond the calls of the episode, and beyond
    those of an answer; ``cost``: what calls took off the reward of an episode.
    """
    equipped = [episode for episode in episodes if any(name.startswith(_CALLS) for name in episode.counters)]
    if not equipped:
        return {}
    figures: dict[str, float] = {}
    names = sorted({name.removeprefix(_CALLS) for one in equipped for name in one.counters if name.startswith(_CALLS)})
    for name in names:
        had = [one for one in equipped if _CALLS + name in one.counters]
        calls = sum(one.counters[_CALLS + name] for one in had)
        key = f"{prefix}/tools/{name}"
        figures[f"{key}/calls"] = calls / len(had)
        if calls:
            figures[f"{key}/failures"] = sum(one.counters.get(_FAILURES + name, 0.0) for one in had) / calls
        users = [one for one in had if one.counters[_CALLS + name] > 0]
        figures[f"{key}/used"] = len(users) / len(had)
        others = [one for one in had if one.counters[_CALLS + name] == 0]
        for which, group in (("with", users), ("without", others)):
            scored = [one for one in group if not one.failed]
            if scored and any(one.success is not None for one in had):
                figures[f"{key}/success_{which}"] = sum(bool(one.success) for one in scored) / len(scored)
    for which, counter in (("unknown", "unknown_tools"), ("refused", "refused_calls"), ("surplus", "surplus_calls")):
        figures[f"{prefix}/tools/{which}"] = sum(one.counters.get(counter, 0.0) for one in equipped) / len(equipped)
    told = [call for one in equipped for turn in one.turns for call in turn.calls]
    figures[f"{prefix}/tools/calls"] = sum(call.error != "limit" for call in told) / len(equipped)
    figures[f"{prefix}/tools/cost"] = sum(call.cost for call in told) / len(equipped)
    return figures


def rollout_metrics(groups: Sequence[Group], prefix: str = "train") -> dict[str, float]:
    """What a batch of episodes says at a glance: success, reward and its parts, lengths, errors and stop reasons."""
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
        f"{prefix}/cut_answers": sum(t.counters.get("cut_answers", 0) for t in episodes) / turns,
        f"{prefix}/illegal_actions": sum(t.counters.get("illegal_actions", 0) for t in episodes) / turns,
    }
    if scored:
        metrics[f"{prefix}/reward"] = float(np.mean([trajectory.reward for trajectory in scored]))
        metrics[f"{prefix}/reward_std"] = float(np.std([trajectory.reward for trajectory in scored]))
        parts = [trajectory.parts for trajectory in scored]
        for name in sorted({name for mine in parts for name in mine} - {"reward"}):
            metrics[f"{prefix}/reward/{name}"] = float(np.mean([mine.get(name, 0.0) for mine in parts]))
        known = [trajectory.success for trajectory in scored if trajectory.success is not None]
        # Where the environment tells success at all, an episode for which it told none has not succeeded.
        if known:
            metrics[f"{prefix}/success"] = sum(bool(value) for value in known) / len(scored)
    metrics |= tool_metrics(episodes, prefix)
    for reason in StopReason:
        share = sum(trajectory.stop_reason == reason for trajectory in episodes) / len(episodes)
        if share:
            metrics[f"{prefix}/stop/{reason.value}"] = share
    return metrics
