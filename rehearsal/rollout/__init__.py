"""Many episodes at once: the agent plays, and groups of trajectories come back."""

from rehearsal.rollout.figures import check_failures, rollout_metrics
from rehearsal.rollout.places import run_coroutine
from rehearsal.rollout.play import Episode, Player, Rollout, Task, tasks_of_step
from rehearsal.rollout.processes import ProcessRollout, may_share

__all__ = [
    "Episode",
    "Player",
    "ProcessRollout",
    "Rollout",
    "Task",
    "check_failures",
    "may_share",
    "rollout_metrics",
    "run_coroutine",
    "tasks_of_step",
]
