"""Held-out play: the same tasks for every policy, never those of training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rehearsal.agents.play import check_reset
from rehearsal.environments.base import TextEnv
from rehearsal.evaluation.categories import category_figures, token_figures
from rehearsal.evaluation.samples import sample_figures
from rehearsal.evaluation.statistics import mean_interval, wilson_interval
from rehearsal.generation.sampling import SamplingParams, stream_key
from rehearsal.rollout import Player, Task, rollout_metrics
from rehearsal.trajectory import Group, Trajectory


def held_out_tasks(seed: int, split: str, count: int) -> list[Task]:
    """The held-out tasks of a seed: the first ones do not depend on how many are asked for."""
    return list(itertools.islice(held_out_stream(seed, split), count))


def held_out_stream(seed: int, split: str) -> Iterator[Task]:
    """The same without end."""
    return (Task(stream_key(seed, "held-out", split, i) % 2**31, split) for i in itertools.count())


class DistinctTasks:
    """Tells tasks that were met from new ones, by what an environment calls them in ``info["task"]``.

    Of 256 draws from a few thousand small levels dozens are repetitions, which make no result surer. One that does not
    name its tasks, or is not ``fast``, is not asked: whatever it draws counts as new. When there seem to be no more new
    ones, all may come again.

    Args:
        env: that the tasks are for; it is reset for each.
    """

    def __init__(self, env: TextEnv) -> None:
        self._env = env
        self._met: set[str] = set()
        self._in_vain = 0

    def take(self, task: Task) -> bool:
        """Whether a task is to be played; it counts as met then."""
        if not self._env.fast:
            return True
        try:
            returned = self._env.reset(seed=task.seed, options={**task.options, "split": task.split})
            key = check_reset(self._env, returned)[1].get("task")
        except Exception:
            return True  # whoever plays it will say what is wrong
        if key is None:
            return True
        if key in self._met:
            self._in_vain += 1
            if self._in_vain <= 50 + 2 * len(self._met):
                return False
            self._met.clear()
        self._in_vain = 0
        self._met.add(key)
        return True


def held_out_picks(seed: int, split: str, size: int | None) -> Iterator[Mapping[str, Any]]:
    """Reset options that pick each task of a split once, in an order that the seed fixes.

    Args:
        seed: of the held-out tasks.
        split: of the tasks.
        size: how many it has, by :meth:`rehearsal.environments.base.TextEnv.task_count`; None, or 0, where they are
            drawn: then there is no end of them, and nothing to pick.
    """
    if not size:
        return itertools.repeat({})
    order = np.random.default_rng(stream_key(seed, "held-out order", split)).permutation(size)
    return ({"index": int(index)} for index in order)


@dataclass
class Evaluation:
    """What held-out play showed.

    Attributes:
        groups: the episodes of each task.
        figures: "success" and "reward", each with its 95% interval ("success_low", "success_high"), "tasks",
            "episodes", "turns", "response_tokens", "format_errors", "failed_episodes" and the shares of stop reasons;
            the cost by :func:`rehearsal.evaluation.categories.token_figures`; where there are several environments or
            kinds of tasks, those of :func:`rehearsal.evaluation.categories.category_figures`, and "success/NAME" of
            each environment.
    """

    groups: list[Group]
    figures: dict[str, float]

    @property
    def success(self) -> float:
        return self.figures.get("success", float("nan"))


def evaluate(
    rollout: Player, tasks: Sequence[Task], *, temperature: float = 1.0, step: int = 0, samples: int = 1,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Play each task, once or several times.

    With several samples the interval of success is over tasks, since episodes of one task are alike, and the figures of
    :func:`rehearsal.evaluation.samples.sample_figures` come with it.

    The sampling noise depends on the task alone and not on the step, so two policies meet the same luck.
    """
    sampling = SamplingParams(temperature=temperature)
    groups = rollout.play(tasks, samples, step=-1, sampling=sampling, on_episode=on_episode)
    for group in groups:
        for trajectory in group:
            trajectory.policy_step = step
    figures = evaluation_figures(groups)
    if samples > 1 and "success" in figures:
        told = sample_figures(groups)
        figures |= {"success_low": told["pass@1/low"], "success_high": told["pass@1/high"], **told}
    return Evaluation(groups, figures)


def evaluation_figures(groups: Sequence[Group]) -> dict[str, float]:
    """The figures of :class:`Evaluation`. A failed episode is counted as failed and enters no rate."""
    plain = {"tasks": float(len(groups))} if groups else {}
    plain |= {name.removeprefix("eval/"): value for name, value in rollout_metrics(groups, "eval").items()}
    scored = [trajectory for group in groups for trajectory in group if not trajectory.failed]
    if scored and any(trajectory.success is not None for trajectory in scored):
        solved = sum(bool(trajectory.success) for trajectory in scored)
        plain["success"] = solved / len(scored)
        plain["success_low"], plain["success_high"] = wilson_interval(solved, len(scored))
        played_in = sorted({trajectory.environment for trajectory in scored})
        for name in played_in if len(played_in) > 1 else []:
            there = [bool(trajectory.success) for trajectory in scored if trajectory.environment == name]
            plain[f"success/{name}"] = sum(there) / len(there)
    if scored:
        rewards = [trajectory.reward for trajectory in scored]
        plain["reward"], plain["reward_low"], plain["reward_high"] = mean_interval(rewards)
    return {**plain, **token_figures(groups), **category_figures(groups)}
