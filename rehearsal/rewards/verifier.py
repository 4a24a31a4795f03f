"""What every verifier takes and gives.

A verifier says how good a completion is as an answer to a task. It either knows, and returns a :class:`Score`, or it
cannot say, and raises :class:`VerificationError`. The second is not a score of 0: an episode whose verifier hung has no
reward, and stays out of the baseline of its group, as every failed episode does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from rehearsal.errors import RehearsalError


@dataclass(frozen=True)
class Task:
    """What a completion is checked against.

    Attributes:
        prompt: what the agent was asked.
        reference: the answer, a list of answers, tests, a schema, ...; what it must be, each verifier says.
        data: whatever else a verifier needs, by name.
    """

    prompt: str
    reference: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What a verifier found.

    Attributes:
        value: the reward, finite.
        passed: whether the completion counts as a solution.
        parts: named parts of the value.
        evidence: what a person reads to see why.

    Raises:
        ValueError: for a value or a part that is not finite.
    """

    value: float
    passed: bool
    parts: Mapping[str, float] = field(default_factory=dict)
    evidence: str = ""

    def __post_init__(self) -> None:
        for name, number in {"value": self.value, **self.parts}.items():
            if not math.isfinite(number):
                raise ValueError(f"the {name} of a score must be finite, not {number}; what has no score is an error")


class VerificationError(RehearsalError):
    """A verifier could not say: it hung, died, or was given a task that it cannot use. There is no score."""


@dataclass(frozen=True)
class Failure:
    """What stands in the place of a :class:`Score` where a verifier could not say.

    Attributes:
        kind: ``timeout`` (it was stopped), ``crash`` (its process died) or ``error`` (it raised, or what it returned
            is not a score).
        message: one sentence about it.
    """

    kind: Literal["timeout", "crash", "error"]
    message: str


@runtime_checkable
class Verifier(Protocol):
    """Says how good a completion is. It must be picklable, unless it ``runs_in`` threads.

    Optional attributes and methods, which :class:`rehearsal.rewards.pool.VerifierPool` looks for:

    - ``runs_in``: ``"process"`` (if absent), or ``"thread"`` for verifiers that wait for something else, such as a
      server or a process of their own, and keep their own time limits.
    - ``warm_up()``: loads what is heavy. It is called once in each process, before any time limit runs.
    - ``facts()``: what it works with, for a plan and the records of a run, such as ``{"sandbox": "namespaces"}``.
    - ``verify_batch(completions, tasks)``: returns a :class:`Score` or a :class:`Failure` for each, for verifiers that
      ``runs_in`` threads and are faster with many at once.

    Attributes:
        name: short, as it appears in figures.
    """

    name: str

    def verify(self, completion: str, task: Task) -> Score:
        """Check a completion.

        Raises:
            VerificationError: if there can be no score.
        """
        ...


def reward_of(result: Score | Failure) -> float:
    """The reward in a result: its value, or NaN, which every estimator of advantages takes for a missing reward."""
    return result.value if isinstance(result, Score) else math.nan
