"""Several verifiers in one reward.

What counts inside a group is how the rewards of its episodes differ, and with a division by the standard deviation only
their ratios. Three facts follow, for a group of G episodes (shown in the tests):

- A lone reward above equal others gets the advantage (G - 1) / sqrt(G), however small it is. So a format reward of 0.1
  in a group where nobody solves the task pushes as hard as a solution would; in a group where somebody does, it pushes
  a tenth as hard. :class:`Gate` gives such parts no chance to be alone.
- Adding the same amount to all episodes changes nothing.
- Without the division (``dr_grpo``, ``rloo``) the sizes stay what they were.

========================  ==============================================================================================
:class:`WeightedSum`      parts compete: what one earns can make up for another
:class:`Gate`             other parts count only with success
:class:`PartialCredit`    the best level that was reached
``normalised_apart``      in :mod:`rehearsal.rewards.groups`: weights hold whatever the spread of a part
``lengths``, ``turns``    in their own modules: numbers to add
========================  ==============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol

from rehearsal.errors import RewardError
from rehearsal.naming import hint
from rehearsal.rewards.pool import VerifierPool
from rehearsal.rewards.verifier import Failure, Score, Task, VerificationError, Verifier
from rehearsal.usage import merged


class Combination(Protocol):
    """Makes one score of several, by name."""

    def __call__(self, scores: Mapping[str, Score]) -> Score:
        """Combine.

        Raises:
            RewardError: where a score that it needs is not there, or one is there that it does not know.
        """
        ...

    @property
    def names(self) -> frozenset[str]:
        """The verifiers whose scores it takes."""
        ...


@dataclass(frozen=True)
class WeightedSum:
    """sum of weight x value. Passed if all of ``success`` passed.

    Group-normalised: the weights act against the spread of each part in the group at hand. Where one part does not
    vary, the others get all of the unit of variance, whatever their weights.

    Attributes:
        weights: by name of a verifier; may be negative.
        success: which must pass; all of positive weight if empty.

    Raises:
        RewardError: for a success that is not among the weights, or where nothing would have to pass.
    """

    weights: Mapping[str, float]
    success: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_known("WeightedSum", self.success, self.weights)
        if not self.success and not any(weight > 0 for weight in self.weights.values()):
            raise RewardError("A weighted sum without positive weights needs to be told what counts as success.")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.weights)

    def __call__(self, scores: Mapping[str, Score]) -> Score:
        _check_names(self, scores)
        needed = self.success or tuple(name for name, weight in self.weights.items() if weight > 0)
        value = sum(weight * scores[name].value for name, weight in self.weights.items())
        return _combined(value, all(scores[name].passed for name in needed), scores)


@dataclass(frozen=True)
class Gate:
    """The value of ``success``, and what the others add only if it passed: ``value + passed x sum of weight x value``.

    With ``needs`` it goes the other way as well: unless all of those pass, everything counts as 0 and as not passed
    (correctness without the format is worth nothing, as in open-instruct).

    Group-normalised: in a group where nobody solves the task all rewards are equal if those of ``success`` are, so a
    lone format pass gets nothing. Among solutions the bonus tells the compliant ones apart; in a mixed group it only
    widens the distance between solved and unsolved. The price: as long as nothing is solved, form is not learnt.

    Attributes:
        success: name of the verifier that opens the gate.
        bonus: weights of those behind it.
        needs: verifiers that must pass for anything to count.
    """

    success: str
    bonus: Mapping[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.success, *self.bonus, *self.needs})

    def __call__(self, scores: Mapping[str, Score]) -> Score:
        _check_names(self, scores)
        if not all(scores[name].passed for name in self.needs):
            return _combined(0.0, False, scores)
        goal = scores[self.success]
        extra = sum(weight * scores[name].value for name, weight in self.bonus.items()) if goal.passed else 0.0
        return _combined(goal.value + extra, goal.passed, scores)


@dataclass(frozen=True)
class PartialCredit:
    """1 for success; else the largest of the levels that were reached, and of ``share`` x the value of ``success``.

    Levels are such as 0.1 for an answer of the right form, as in TinyZero; a share suits a verifier whose value is the
    share of the tests that passed.

    Group-normalised: partial credit makes groups without a solution teach something, which is its use on hard tasks;
    dividing by the standard deviation then gives the best partial answer of such a group the advantage of a full
    solution, and a policy may settle there. Take it away as successes come, or do not divide.

    Attributes:
        success: name of the verifier of the whole.
        levels: value below 1 for passing another verifier, by name.
        share: of the value of ``success``, below 1.

    Raises:
        RewardError: for levels or a share outside [0, 1).
    """

    success: str
    levels: Mapping[str, float] = field(default_factory=dict)
    share: float = 0.0

    def __post_init__(self) -> None:
        for name, level in {**self.levels, "share": self.share}.items():
            if not 0 <= level < 1:
                raise RewardError(f"Partial credit for {name} must be at least 0 and below 1, not {level}.")

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.success, *self.levels})

    def __call__(self, scores: Mapping[str, Score]) -> Score:
        _check_names(self, scores)
        goal = scores[self.success]
        if goal.passed:
            return _combined(1.0, True, scores)
        reached = [level for name, level in self.levels.items() if scores[name].passed]
        return _combined(max([0.0, self.share * min(goal.value, 1.0), *reached]), False, scores)


@dataclass(frozen=True)
class Composite:
    """Several verifiers as one, for those that run in the same place. Without a score of one part there is none.

    Attributes:
        verifiers: by the names that the combination uses.
        combine: makes one score of theirs.

    Raises:
        RewardError: where names do not agree, or some run in processes and some in threads; check those side by side
            with :func:`verify_combined`.
    """

    verifiers: Mapping[str, Verifier]
    combine: Combination
    name: str = "composite"

    def __post_init__(self) -> None:
        if set(self.verifiers) != self.combine.names:
            raise RewardError(
                f"The combination takes {', '.join(sorted(self.combine.names))}, but the verifiers are "
                f"{', '.join(sorted(self.verifiers)) or 'none'}."
            )
        if len({getattr(verifier, "runs_in", "process") for verifier in self.verifiers.values()}) > 1:
            raise RewardError(
                "Some of these verifiers run in processes and some in threads; give them to one pool and combine "
                "their scores with verify_combined."
            )

    @property
    def runs_in(self) -> str:
        """Where its verifiers run."""
        return str(getattr(next(iter(self.verifiers.values())), "runs_in", "process"))

    def facts(self) -> dict[str, str]:
        """Those of its verifiers."""
        return merged(getattr(verifier, "facts", dict)() for verifier in self.verifiers.values())

    def warm_up(self) -> None:
        for verifier in self.verifiers.values():
            getattr(verifier, "warm_up", lambda: None)()

    def verify(self, completion: str, task: Task) -> Score:
        scores = {}
        for name, verifier in self.verifiers.items():
            try:
                scores[name] = verifier.verify(completion, task)
            except VerificationError as problem:
                raise VerificationError(f"{name}: {problem}") from problem
        return self.combine(scores)


def combination(name: str, options: Mapping[str, Any]) -> Combination:
    """A combination by name, so that a recipe can ask for one.

    Args:
        name: "sum" for :class:`WeightedSum`, "gate" for :class:`Gate`, "partial" for :class:`PartialCredit`.
        options: its attributes.

    Raises:
        RewardError: for an unknown name or option, one that is missing, or a value of the wrong type or out of range.
    """
    if name not in _COMBINATIONS:
        raise RewardError(f"There is no combination {name!r}; {hint(name, sorted(_COMBINATIONS))}")
    made = _COMBINATIONS[name]
    known = {attribute.name: attribute for attribute in fields(made)}
    for option, value in options.items():
        if option not in known:
            raise RewardError(f"The combination {name} has no option {option!r}; {hint(option, sorted(known))}")
        _check_type(f"{option} of the combination {name}", value, str(known[option].type))
    for option, attribute in known.items():
        if option not in options and attribute.default is MISSING and attribute.default_factory is MISSING:
            raise RewardError(f"The combination {name} needs {option}.")
    return made(**{option: tuple(value) if isinstance(value, list) else value for option, value in options.items()})


def verify_combined(
    pool: VerifierPool, combine: Combination, completions: Sequence[str], tasks: Sequence[Task]
) -> list[Score | Failure]:
    """Check completions with all the verifiers of a pool that a combination takes, and combine their scores.

    Returns:
        for each completion a score, or the first failure among its parts.

    Raises:
        RewardError: see :meth:`VerifierPool.verify`.
    """
    names = sorted(combine.names)
    results = pool.verify(
        [completion for completion in completions for _ in names], [task for task in tasks for _ in names],
        names * len(completions),
    )  # fmt: skip
    combined: list[Score | Failure] = []
    for start in range(0, len(results), len(names)):
        scores: dict[str, Score] = {}
        failure = None
        for name, result in zip(names, results[start : start + len(names)], strict=True):
            if isinstance(result, Score):
                scores[name] = result
            elif failure is None:
                failure = Failure(result.kind, f"{name}: {result.message}")
        combined.append(failure or combine(scores))
    return combined


_COMBINATIONS: dict[str, Any] = {"sum": WeightedSum, "gate": Gate, "partial": PartialCredit}


def _check_type(what: str, value: object, wanted: str) -> None:
    if wanted == "str":
        fits, told = isinstance(value, str), "a name"
    elif wanted == "float":
        fits, told = _is_number(value), "a number"
    elif wanted.startswith("Mapping"):
        fits = isinstance(value, Mapping) and all(map(_is_number, value.values()))
        told = "a table of numbers by name"
    else:
        fits = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
        told = "a list of names"
    if not fits:
        raise RewardError(f"{what} must be {told}, not {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _combined(value: float, passed: bool, scores: Mapping[str, Score]) -> Score:
    parts = {name: score.value for name, score in scores.items()}
    for name, score in scores.items():
        parts.update({f"{name}/{part}": number for part, number in score.parts.items()})
    return Score(value, passed, parts, "; ".join(f"{name}: {score.evidence}" for name, score in scores.items()))


def _check_names(combine: Combination, scores: Mapping[str, Score]) -> None:
    if set(scores) != combine.names:
        raise RewardError(
            f"{type(combine).__name__} takes scores of {', '.join(sorted(combine.names))}, "
            f"not of {', '.join(sorted(scores)) or 'none'}."
        )


def _check_known(what: str, given: Sequence[str], known: Mapping[str, float]) -> None:
    for name in given:
        if name not in known:
            raise RewardError(f"{what} has no part {name!r}; there are: {', '.join(sorted(known)) or 'none'}.")
