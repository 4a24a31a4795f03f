"""Which tasks to play next, from how well the earlier ones went.

A sampler deals :class:`Draw` s: the number of an environment and the number of a task in it. It is told the success of
every group that was played (a share of its episodes, NaN where none has a result), keeps what it learns in plain
numbers, and gives them out as state, so a resumed run goes on as if it had not stopped. What it draws depends on its
state and on the generator that it is handed, nothing else.

A task that is drawn again later is met by a better policy, so all samplers but :class:`Fresh` work on a pool of a fixed
size. What a task's success was is an exponential average over its visits, so old visits are forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rehearsal.errors import RecipeError

Floats = NDArray[np.float64]

NEWEST_WEIGHT = 0.5
"""Weight of a visit in the average success of its task."""
_SLOW_WEIGHT = NEWEST_WEIGHT / 4
_SCATTER = (
    NEWEST_WEIGHT / (2 - NEWEST_WEIGHT)
    + _SLOW_WEIGHT / (2 - _SLOW_WEIGHT)
    - 2 * NEWEST_WEIGHT * _SLOW_WEIGHT / (1 - (1 - NEWEST_WEIGHT) * (1 - _SLOW_WEIGHT))
)
"""Variance of the difference of the two averages over that of a visit, when nothing is learned."""
_KNOWN_VISITS = 3
"""Visits before which nothing is known of a task's progress."""
ADAPTIVE = {"curriculum/adaptive": 1.0}
"""What samplers tell that choose tasks by their success. They hold success in training where it is by their choice, so
neither it nor the reward says whether the policy gets better."""
RISE = 0.02
"""How much the success of a stage has to grow for it not to stall: less is what chance does to a window."""


class Draw(NamedTuple):
    """A task to play.

    Attributes:
        environment: which of the run's environments.
        number: which task of its pool; None for one that nobody has met.
    """

    environment: int = 0
    number: int | None = None


class Sampler(Protocol):
    """Deals tasks and learns from how they went."""

    def draw(self, count: int, rng: np.random.Generator, played: Sequence[Draw] = ()) -> list[Draw]:
        """The next ``count`` tasks; those that the step has ``played`` already only where there are no others."""

    def observe(self, draws: Sequence[Draw], success_P: Sequence[float] | Floats) -> None:
        """Take in the success of groups that were played: shares from 0 to 1, NaN for unknown."""

    def figures(self) -> dict[str, float]:
        """How things stand, for the metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned, in plain Python types."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""


@dataclass
class Fresh:
    """Tasks that nobody has met, all alike.

    Attributes:
        environment: their environment.
    """

    environment: int = 0

    def draw(self, count: int, rng: np.random.Generator, played: Sequence[Draw] = ()) -> list[Draw]:
        return [Draw(self.environment)] * count

    def observe(self, draws: Sequence[Draw], success_P: Sequence[float] | Floats) -> None:
        pass

    def figures(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@dataclass
class _Pool:
    """A pool of tasks and what is known of each."""

    tasks: int = 512
    environment: int = 0
    _success: Floats = field(init=False, repr=False)
    _slow: Floats = field(init=False, repr=False)
    _visits: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise RecipeError(f"A curriculum needs a pool of at least one task, not {self.tasks}.")
        self._success = np.full(self.tasks, np.nan)
        self._slow = np.full(self.tasks, np.nan)
        self._visits = np.zeros(self.tasks, dtype=np.int64)

    def observe(self, draws: Sequence[Draw], success_P: Sequence[float] | Floats) -> None:
        for draw, success in zip(draws, success_P, strict=True):
            if draw.number is None or np.isnan(success):
                continue
            task = draw.number
            first = self._visits[task] == 0
            for average, weight in ((self._success, NEWEST_WEIGHT), (self._slow, _SLOW_WEIGHT)):
                average[task] = success if first else average[task] + weight * (success - average[task])
            self._visits[task] += 1

    def _fresh(self, played: Sequence[Draw]) -> NDArray[np.bool_]:
        """bool of shape (tasks,): those that are not among the played ones."""
        fresh = np.ones(self.tasks, dtype=bool)
        for draw in played:
            if draw.environment == self.environment and draw.number is not None:
                fresh[draw.number] = False
        return fresh

    def _choose(self, count: int, weights: Floats, rng: np.random.Generator, played: Sequence[Draw] = ()) -> list[Draw]:
        """Tasks by weight, none twice, and none that was played, as long as the pool reaches."""
        drawn: list[int] = []
        left = np.where(self._fresh(played), weights, 0.0)
        while len(drawn) < count:
            if not left.any():
                left = weights
            some = min(count - len(drawn), int((left > 0).sum()))
            drawn += rng.choice(self.tasks, size=some, replace=False, p=left / left.sum()).tolist()
            left = np.zeros(self.tasks)
        return [Draw(self.environment, task) for task in drawn]

    def figures(self) -> dict[str, float]:
        seen = self._visits > 0
        figures = {"curriculum/seen": float(seen.mean())}
        if seen.any():
            figures["curriculum/pool_success"] = float(self._success[seen].mean())
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "success": self._success.tolist(), "slow": self._slow.tolist(), "visits": self._visits.tolist(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["visits"]) != self.tasks:
            raise RecipeError(
                f"The curriculum of this run has a pool of {len(state['visits'])} tasks, not {self.tasks}; leave "
                "curriculum.tasks as it was."
            )
        self._success = np.array(state["success"], dtype=np.float64)
        self._slow = np.array(state["slow"], dtype=np.float64)
        self._visits = np.array(state["visits"], dtype=np.int64)


@dataclass
class Uniform(_Pool):
    """Every task of the pool alike: the control for the other pools."""

    def draw(self, count: int, rng: np.random.Generator, played: Sequence[Draw] = ()) -> list[Draw]:
        return self._choose(count, np.ones(self.tasks), rng, played)


@dataclass
class ByDifficulty(_Pool):
    """Tasks whose measured success lies inside a band, and those that were never met; the rest now and then.

    Attributes:
        low, high: ends of the band, both inside it.
        retry: share of the draws that goes to tasks outside the band, so that one that has become possible (or was
            forgotten) is found. More only where the band has too few tasks.
    """

    low: float = 0.2
    high: float = 0.8
    retry: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low <= self.high <= 1:
            raise RecipeError(
                f"The band of a curriculum must satisfy 0 <= low <= high <= 1, not {self.low}, {self.high}."
            )
        _check_share("retry", self.retry)

    @property
    def _inside(self) -> NDArray[np.bool_]:
        return (self._visits == 0) | ((self._success >= self.low) & (self._success <= self.high))

    def draw(self, count: int, rng: np.random.Generator, played: Sequence[Draw] = ()) -> list[Draw]:
        inside = self._inside
        wanted = int(rng.binomial(count, self.retry)) if (~inside).any() else 0
        fresh = self._fresh(played)
        reach = int((inside & fresh).sum())
        # No task twice for the sake of a retry.
        wanted = min(wanted, int((~inside & fresh).sum()))
        outside_count = max(wanted, count - reach) if (~inside).any() else 0
        outside_count = min(outside_count, count)
        draws: list[Draw] = []
        if count > outside_count:
            draws += self._choose(count - outside_count, inside.astype(np.float64), rng, played)
        if outside_count:
            draws += self._choose(outside_count, (~inside).astype(np.float64), rng, played)
        return draws

    def figures(self) -> dict[str, float]:
        seen = self._visits > 0
        inside = float((self._inside & seen).sum() / seen.sum()) if seen.any() else float("nan")
        return super().figures() | ADAPTIVE | ({"curriculum/in_band": inside} if seen.any() else {})


_UNKNOWN_GAIN = 0.25
"""Of a task of which nothing is known: the most that the variance of a success can be, and a fair hope of progress."""


@dataclass
class Prioritised(_Pool):
    """Tasks by what can be learned from them.

    Attributes:
        by: "variance", the expected variance of a success p, p (1 - p); or "progress", how far the average over recent
            visits is from the one over earlier visits, up or down, less what chance does. A task that was never met
            (for progress: met fewer than three times) counts as the best.
        explore: share of the probability that is spread evenly over all tasks.
        episodes: of a visit; what chance does to a share of few episodes is more.
    """

    by: Literal["variance", "progress"] = "variance"
    explore: float = 0.1
    episodes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("variance", "progress"):
            raise RecipeError(f'A prioritised curriculum goes by "variance" or "progress", not {self.by!r}.')
        _check_share("explore", self.explore)

    def draw(self, count: int, rng: np.random.Generator, played: Sequence[Draw] = ()) -> list[Draw]:
        known = self._visits >= (1 if self.by == "variance" else _KNOWN_VISITS)
        success = np.where(known, self._success, 0.5)
        gain = success * (1 - success)
        if self.by == "progress":
            # One success and one failure more, so that a task which was always solved does not count as without chance.
            smooth = (success * self.episodes + 1) / (self.episodes + 2)
            scatter = np.sqrt(_SCATTER * smooth * (1 - smooth) / self.episodes)
            gain = np.maximum(np.abs(success - np.where(known, self._slow, 0.5)) - scatter, 0.0)
        gain = np.where(known, gain, max(float(gain[known].max(initial=0.0)), _UNKNOWN_GAIN))
        total = gain.sum()
        even = np.full(self.tasks, 1 / self.tasks)
        return self._choose(
            count, self.explore * even + (1 - self.explore) * (gain / total if total > 0 else even), rng, played
        )

    def figures(self) -> dict[str, float]:
        return super().figures() | ADAPTIVE


@dataclass
class Staged:
    """Harder environments one after the other, each when the one before is mastered.

    A stage that brings relief, such as a tool, may also begin when the one before has turned out too hard: its success
    is below the threshold and has stopped rising.

    Attributes:
        stages: how many; environments ``environment`` to ``environment + stages - 1``.
        threshold: success over the last ``window`` groups of the present stage that ends it.
        window: groups.
        review: share of the draws that goes to earlier stages.
        environment: the first one.
        relief: the stages that also begin when the one before has stalled.
        patience: groups of a stage in which its success, over the last ``window`` of them, has not risen by
            :data:`RISE`, after which it has stalled; None if no stage ever does.
        stage: the present one, from 0.
    """

    stages: int = 1
    threshold: float = 0.8
    window: int = 64
    review: float = 0.1
    environment: int = 0
    relief: frozenset[int] = frozenset()
    patience: int | None = None
    stage: int = field(default=0, init=False)
    _recent: list[float] = field(default_factory=list, init=False, repr=False)
    _best: float | None = field(default=None, init=False, repr=False)
    _since_rise: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.patience is not None and self.patience < 1:
            raise RecipeError(f"The patience of a staged curriculum is at least one group, not {self.patience}.")
        if self.stages < 1 or self.window < 1:
            raise RecipeError(f"A staged curriculum needs stages and a window, not {self.stages} and {self.window}.")
        _check_share("threshold", self.threshold)
        _check_share("review", self.review)

    def draw(self, count: int, rng: np.random.Generator, played: Sequence[Draw] = ()) -> list[Draw]:
        back = rng.random(count) < self.review
        earlier = rng.integers(0, max(1, self.stage), count)
        return [
            Draw(self.environment + int(e if b and self.stage else self.stage))
            for b, e in zip(back, earlier, strict=True)
        ]

    def observe(self, draws: Sequence[Draw], success_P: Sequence[float] | Floats) -> None:
        played = [
            float(success)
            for draw, success in zip(draws, success_P, strict=True)
            if draw.environment == self.environment + self.stage and not np.isnan(success)
        ]
        self._recent = [*self._recent, *played][-self.window :]
        if len(self._recent) < self.window:
            return
        success = sum(self._recent) / self.window
        if self._best is None or success >= self._best + RISE:
            self._best, self._since_rise = success, 0
        else:
            self._since_rise += len(played)
        stalled = self.patience is not None and self._since_rise >= self.patience
        over = success >= self.threshold or (stalled and self.stage + 1 in self.relief)
        if over and self.stage + 1 < self.stages:
            self.stage += 1
            self._recent, self._best, self._since_rise = [], None, 0

    def figures(self) -> dict[str, float]:
        figures = {"curriculum/stage": float(self.stage)}
        if self._recent:
            figures["curriculum/stage_success"] = sum(self._recent) / len(self._recent)
        if self.patience is not None:
            figures["curriculum/since_rise"] = float(self._since_rise)
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage, "recent": list(self._recent), "best": self._best, "since_rise": self._since_rise,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not 0 <= state["stage"] < self.stages:
            raise RecipeError(f"This run has reached stage {state['stage'] + 1}, and the curriculum has {self.stages}.")
        self.stage, self._recent = int(state["stage"]), [float(value) for value in state["recent"]]
        # Runs that began before stages could stall have no such state.
        self._best, self._since_rise = state.get("best"), int(state.get("since_rise", 0))


@dataclass
class Mixture:
    """Several samplers side by side, each with a share of every step.

    Attributes:
        samplers: over environments of their own.
        weights: of the draws; shares of a step differ from these by less than one task.
    """

    samplers: Sequence[Sampler]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.samplers or len(self.samplers) != len(self.weights):
            raise RecipeError("A mixture needs at least one environment, and a weight for each.")
        if min(self.weights) <= 0:
            raise RecipeError(f"The weights of a mixture must be above 0, not {list(self.weights)}.")
        self._of: dict[int, int] = {}

    def draw(self, count: int, rng: np.random.Generator, played: Sequence[Draw] = ()) -> list[Draw]:
        shares = np.asarray(self.weights, dtype=np.float64) * count / sum(self.weights)
        counts = np.floor(shares).astype(int)
        # What the whole parts leave over goes out by lot, each with the chance of its fraction.
        rest = count - int(counts.sum())
        if rest:
            fractions = shares - counts
            counts[rng.choice(len(counts), size=rest, replace=False, p=fractions / fractions.sum())] += 1
        draws: list[Draw] = []
        for part, (sampler, some) in enumerate(zip(self.samplers, counts, strict=True)):
            drawn = sampler.draw(int(some), rng, played) if some else []
            self._of |= {draw.environment: part for draw in drawn}
            draws += drawn
        return draws

    def observe(self, draws: Sequence[Draw], success_P: Sequence[float] | Floats) -> None:
        for part, sampler in enumerate(self.samplers):
            mine = [i for i, draw in enumerate(draws) if self._of.get(draw.environment) == part]
            sampler.observe([draws[i] for i in mine], [float(success_P[i]) for i in mine])

    def figures(self) -> dict[str, float]:
        return {
            f"{name}/{part}": value
            for part, sampler in enumerate(self.samplers)
            for name, value in sampler.figures().items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [sampler.state_dict() for sampler in self.samplers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["parts"]) != len(self.samplers):
            raise RecipeError(
                f"This run mixes {len(state['parts'])} environments and not {len(self.samplers)}; leave the mixture "
                "as it was."
            )
        for sampler, part in zip(self.samplers, state["parts"], strict=True):
            sampler.load_state_dict(part)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"{name} of a curriculum must be a share from 0 to 1, not {value}.")
