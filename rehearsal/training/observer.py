"""Whoever watches a run: the terminal, a notebook, a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rehearsal.diagnostics import Verdict
from rehearsal.trajectory import Trajectory

if TYPE_CHECKING:
    from rehearsal.training.loop import Trainer


class Observer(Protocol):
    """Whoever watches a run: the terminal, a notebook, a test."""

    def started(self, trainer: Trainer) -> None: ...

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

    def started(self, trainer: Trainer) -> None: ...

    def playing(self, what: str, total: int) -> None: ...

    def episode(self, trajectory: Trajectory) -> None: ...

    def learning(self) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def verdict(self, step: int, verdict: Verdict) -> None: ...

    def evaluation(self, step: int, split: str, figures: Mapping[str, float]) -> None: ...

    def finished(self, summary: Mapping[str, Any]) -> None: ...
