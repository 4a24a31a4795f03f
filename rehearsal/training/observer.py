"""Whoever watches a run: the terminal, a notebook, a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rehearsal.algorithms.presets import Algorithm
from rehearsal.diagnostics import Verdict
from rehearsal.models.load import Policy
from rehearsal.rollout import Rollout
from rehearsal.training.recipe import Recipe
from rehearsal.training.runs import RunFolder
from rehearsal.trajectory import Trajectory


class Watched(Protocol):
    """What an observer is shown of a run: a :class:`rehearsal.training.loop.Trainer`.

    Attributes:
        recipe, policy, algorithm, folder: of the run; no folder where nothing is written.
        rollout: what plays, with its engine and limits.
        processes: how many play.
        steps_done: optimiser steps so far.
        stop_requested: set it, and the run ends after the present step.
    """

    recipe: Recipe
    policy: Policy | None
    algorithm: Algorithm
    folder: RunFolder | None
    rollout: Rollout
    processes: int
    steps_done: int
    stop_requested: bool


class Observer(Protocol):
    """Whoever watches a run: the terminal, a notebook, a test."""

    def started(self, trainer: Watched) -> None: ...

    def playing(self, what: str, total: int) -> None:
        """``total`` episodes are about to be played; ``what`` says what for."""

    def episode(self, trajectory: Trajectory) -> None: ...

    def learning(self) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def verdict(self, step: int, verdict: Verdict) -> None: ...

    def evaluation(self, step: int, split: str, figures: Mapping[str, float]) -> None: ...

    def finished(self, summary: Mapping[str, Any]) -> None: ...


class SilentObserver:
    """Shows nothing."""

    def started(self, trainer: Watched) -> None: ...

    def playing(self, what: str, total: int) -> None: ...

    def episode(self, trajectory: Trajectory) -> None: ...

    def learning(self) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def verdict(self, step: int, verdict: Verdict) -> None: ...

    def evaluation(self, step: int, split: str, figures: Mapping[str, float]) -> None: ...

    def finished(self, summary: Mapping[str, Any]) -> None: ...
