"""Many episodes at once: the agent plays, and groups of trajectories come back."""

from rehearsal.rollout.figures import check_failures, rollout_metrics, signal_metrics
from rehearsal.rollout.places import run_coroutine
from rehearsal.rollout.play import Episode, Rollout, Task, tasks_of_step

__all__ = [
    "Episode",
    "Rollout",
    "Task",
    "check_failures",
    "rollout_metrics",
    "run_coroutine",
    "signal_metrics",
    "tasks_of_step",
]
