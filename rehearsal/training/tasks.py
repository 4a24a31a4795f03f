"""Which tasks a run plays, in which of its environments, and those that it is judged by."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from rehearsal.agents.toolkit import source_name
from rehearsal.algorithms.curriculum import ByDifficulty, Draw, Fresh, Mixture, Prioritised, Sampler, Staged, Uniform
from rehearsal.environments.base import TextEnv
from rehearsal.environments.registry import check_names, make
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.evaluation.held_out import DistinctTasks, held_out_picks, held_out_stream
from rehearsal.generation.sampling import stream_key
from rehearsal.rollout import Task, tasks_of_step
from rehearsal.training.options import AgentOptions, CurriculumOptions
from rehearsal.training.recipe import Recipe
from rehearsal.trajectory import Group


class Variant(NamedTuple):
    """One of a run's environments.

    Attributes:
        name: as :func:`rehearsal.environments.make` takes it.
        params: its parameters.
        agent: options of the agent that differ from the recipe's.
    """

    name: str
    params: Mapping[str, Any]
    agent: AgentOptions

    def make(self) -> TextEnv:
        return make(self.name, **self.params)

    @property
    def maker(self) -> partial[TextEnv]:
        """Makes the environment; can be sent to other processes."""
        return partial(make, self.name, **self.params)


_STAGED_OPTIONS = ("max_turns", "max_actions_per_turn", "max_actions", "max_tokens_per_turn")
"""What a stage may change about the agent: its limits. The format stays, and so does the engine's context."""


def variants_of(recipe: Recipe) -> list[Variant]:
    """The environments of a recipe: the one, those of its mixture, or one a stage.

    Raises:
        RecipeError: for a stage that changes what it cannot.
    """
    if recipe.mixture:
        return [Variant(part.name, part.params, recipe.agent) for part in recipe.mixture]
    own = recipe.environment
    if not recipe.curriculum.stages:
        return [Variant(own.name, own.params, recipe.agent)]
    variants = []
    for number, stage in enumerate(recipe.curriculum.stages, start=1):
        params = {name: value for name, value in stage.items() if name not in ("agent", "tools")}
        changes = stage.get("agent", {})
        if not isinstance(changes, Mapping):
            raise RecipeError(f"agent in stage {number} must be a table of options, not {changes!r}.")
        check_names(f"option of the agent (in stage {number}) called", changes, _STAGED_OPTIONS)
        try:
            agent = AgentOptions.model_validate({**recipe.agent.model_dump(), **changes})
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(
                f"agent.{first['loc'][0]} in stage {number} cannot be {first['input']!r}: {first['msg']}."
            ) from error
        variants.append(Variant(own.name, {**own.params, **params}, agent))
    return variants


def unlocked_tools(recipe: Recipe) -> list[set[str]]:
    """What each stage of a recipe unlocks, by the names of ``tools.names`` or of the environment's own tools."""
    return [set(stage.get("tools", [])) for stage in recipe.curriculum.stages]


def locked_tools(recipe: Recipe) -> list[tuple[str, ...]]:
    """For each stage the tools that a later one unlocks, as a toolkit names them; one empty tuple without stages."""
    unlocked = unlocked_tools(recipe) or [set[str]()]
    locked = []
    for stage in range(len(unlocked)):
        later = set[str]().union(*unlocked[stage + 1 :]) - set[str]().union(*unlocked[: stage + 1])
        locked.append(tuple(sorted(source_name(name) if name in recipe.tools.names else name for name in later)))
    return locked


def make_sampler(recipe: Recipe) -> Sampler:
    """The sampler that a recipe asks for.

    Raises:
        RecipeError: for values that do not go together.
    """
    options = recipe.curriculum
    if options.name == "staged":
        relief = frozenset(stage for stage, unlocked in enumerate(unlocked_tools(recipe)) if unlocked)
        return Staged(
            len(options.stages), options.threshold, options.window, options.review, relief=relief,
            patience=options.patience,
        )  # fmt: skip
    if recipe.mixture:
        parts = [_single(options, number, recipe.training.group_size) for number in range(len(recipe.mixture))]
        return Mixture(parts, [part.weight for part in recipe.mixture])
    return _single(options, 0, recipe.training.group_size)


def _single(options: CurriculumOptions, environment: int, group_size: int) -> Sampler:
    if options.name == "uniform":
        return Uniform(options.tasks, environment)
    if options.name == "difficulty":
        return ByDifficulty(options.tasks, environment, low=options.low, high=options.high, retry=options.retry)
    if options.name in ("variance", "progress"):
        by: Any = options.name
        return Prioritised(options.tasks, environment, by=by, explore=options.explore, episodes=group_size)
    return Fresh(environment)


class TaskSource:
    """Deals the tasks of a run.

    Args:
        recipe: of the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._seed = recipe.seed
        self.variants = variants_of(recipe)
        self._mixed = bool(recipe.mixture)
        self._learns = recipe.curriculum.name not in ("fresh", "uniform")
        self.sampler = make_sampler(recipe)
        self._locked = locked_tools(recipe)
        self._drawn: list[Draw] = []
        self._held_out: dict[tuple[int, str, int], list[Task]] = {}

    def of_step(self, step: int, count: int, first: int = 0) -> list[Task]:
        """The tasks of a training step: a function of seed, step and what the sampler has learned.

        Args:
            step: number of the step, from 0.
            count: how many.
            first: how many the step has had before; 0 begins a step.
        """
        if first == 0:
            self._drawn = []
        draws = self.sampler.draw(count, np.random.default_rng([self._seed, step, first, 11]), self._drawn)
        fresh = tasks_of_step(self._seed, step, count, first=first)
        tasks = []
        for draw, new in zip(draws, fresh, strict=True):
            tasks.append(self._task(draw, new, self._drawn.count(draw)))
            self._drawn.append(draw)
        return tasks

    def _task(self, draw: Draw, fresh: Task, before: int) -> Task:
        if draw.number is None:
            return Task(fresh.seed, fresh.split, draw.environment, locked=self.locked)
        seed = stream_key(self._seed, "pool", draw.environment, draw.number) % 2**31
        return Task(seed, fresh.split, draw.environment, locked=self.locked, again=before)

    def observe(self, groups: Sequence[Group]) -> None:
        """Tell the sampler how the tasks of the step went, in the order in which they were drawn.

        Raises:
            EnvironmentFault: if the curriculum goes by success and the environment tells none.
        """
        success = [success_share(group) for group in groups]
        played = any(not trajectory.failed for group in groups for trajectory in group)
        if self._learns and played and all(np.isnan(share) for share in success):
            raise EnvironmentFault(
                "This curriculum goes by success, and the environment tells none: report it as info['success'], or set "
                "curriculum.name to fresh."
            )
        self.sampler.observe(self._drawn, success)

    @property
    def families(self) -> list[int] | None:
        """The environment of each task of the step where several are mixed, else None."""
        return [draw.environment for draw in self._drawn] if self._mixed else None

    @property
    def names(self) -> list[str]:
        """What the environments are called in figures; numbered where several have the same name."""
        own = [variant.name for variant in self.variants]
        return [name if own.count(name) == 1 else f"{name} {number}" for number, name in enumerate(own, start=1)]

    @property
    def locked(self) -> tuple[str, ...]:
        """The tools that no episode has as yet. What is unlocked is so for tasks of earlier stages too."""
        return self._locked[self.sampler.stage if isinstance(self.sampler, Staged) else 0]

    def held_out(self, seed: int, split: str, count: int) -> list[Task]:
        """Tasks to be judged by: of a mixture all environments in turn, of stages the last one, with the tools of the
        present one.

        Where an environment counts its tasks, each is there once, so there may be fewer than ``count`` of them. In a
        mixture the others go on when the tasks of one are used up. Where it draws and names them, none is there twice
        as long as there are others.

        Raises:
            RehearsalError: for an environment that cannot be made.
        """
        if (seed, split, count) not in self._held_out:
            self._held_out[seed, split, count] = self._draw_held_out(seed, split, count)
        return [replace(task, locked=self.locked) for task in self._held_out[seed, split, count]]

    def _draw_held_out(self, seed: int, split: str, count: int) -> list[Task]:
        last = len(self.variants) - 1
        playing = deque(range(last + 1) if self._mixed else [last])
        with contextlib.ExitStack() as opened:
            envs = {part: opened.enter_context(contextlib.closing(self.variants[part].make())) for part in playing}
            sizes = {part: env.task_count(split) for part, env in envs.items()}
            picks = {part: held_out_picks(seed, split, size) for part, size in sizes.items()}
            fresh = {part: DistinctTasks(envs[part]) for part, size in sizes.items() if not size}
            tasks: list[Task] = []
            for task in held_out_stream(seed, split):
                options = None
                while options is None and playing:
                    options = next(picks[playing[0]], None)
                    if options is None:
                        playing.popleft()
                if options is None or len(tasks) == count:
                    break
                part = playing[0]
                task = replace(task, environment=part, options=options)
                if part not in fresh or fresh[part].take(task):
                    tasks.append(task)
                    playing.rotate(-1)
            return tasks


def success_share(group: Group) -> float:
    """Share of a group's episodes that succeeded; NaN where none has a result."""
    played = [trajectory.success for trajectory in group if not trajectory.failed]
    if all(outcome is None for outcome in played):
        return float("nan")
    return sum(bool(outcome) for outcome in played) / len(played)
