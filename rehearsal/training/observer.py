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
        facts, usage: what environments, tools and verifiers work with, and what the run has used so far.
        steps_done: optimiser steps so far.
        stop_requested: set it, and the run ends after the present step.
    """

    recipe: Recipe
    policy: Policy | None
    algorithm: Algorithm
    folder: RunFolder | None
    rollout: Rollout
    processes: int
    facts: dict[str, str]
    usage: dict[str, float]
    steps_done: int
    stop_requested: bool


class Observer:
    """Whoever watches a run. Every method does nothing; one that watches overrides what it wants to see."""

    def started(self, trainer: Watched) -> None:
        """The run is about to begin, or to go on."""

    def playing(self, what: str, total: int) -> None:
        """``total`` episodes are about to be played; ``what`` says what for."""

    def episode(self, trajectory: Trajectory) -> None:
        """An episode has ended."""

    def learning(self) -> None:
        """The episodes of a step are played, and the policy learns from them."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""

    def verdict(self, step: int, verdict: Verdict) -> None:
        """Something was found wrong."""

    def warning(self, sentence: str) -> None:
        """Something is not as one would want it, and the run goes on."""

    def evaluation(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        """Held-out tasks were played."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run has ended."""


class SilentObserver(Observer):
    """Shows nothing."""
