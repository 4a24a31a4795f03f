"""Which groups, or which episodes of them, the policy learns from.

A filter acts on the policy objective alone: the tokens that it turns down still serve every other objective (the
critic, a world model) and stay in the baseline of their group. Its answer therefore goes into
``TokenBatch.policy_mask_N`` and never into the list of rollouts. What belongs to the policy's objective (its KL term
and its entropy bonus) goes with it.

Why groups at all: in a group without reward variance the group-normalised advantages are all zero, and what is left of
the gradient is noise and regularisation (RAGEN-2). How much variance is enough is the
question that the filters below answer differently. No filter has an absolute threshold, so none depends on the scale of
the rewards, with one exception: ``mass="softmax"``, which is kept as published.

============  ========================================================================================================
``none``      keeps everything that has a reward
``constant``  drops groups without variance, as DAPO does (arXiv:2503.14476, eq. 11)
``top_k``     keeps the k groups of largest variance, or the share k of the groups
``top_p``     keeps the smallest number of groups that together hold a share p of the mass
``min_p``     keeps groups whose mass is at least p times the largest
``random``    keeps as many groups as another filter would, whichever they are: the control
``extremes``  keeps the best and the worst episodes of each group
============  ========================================================================================================

The mass of a group is its variance (the paper), its standard deviation, or the softmax of the standard deviations (the
published code). Variances are those of the population, and so are the deviations, but for the softmax, which is taken
of the unbiased ones as in the published code. Departures from that code, each on purpose: it subtracts 0.01 from the
mass that is wanted (which drops everything where rewards are small), and breaks ties by the order of a sort that is not
stable. Here ties are broken by the order of the groups, and sums are compared up to rounding.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rehearsal.algorithms.advantages import checked_rewards
from rehearsal.algorithms.variance import MASSES, Mass, group_variance, has_variance, variance_mass
from rehearsal.errors import RecipeError

Bools = NDArray[np.bool_]
LossScaling = Literal["none", "share", "sqrt"]

_ROUNDING = 1e-12
"""Relative. Sums of masses that are equal on paper may differ by this much."""


@dataclass(frozen=True)
class Kept:
    """What a filter says of a batch of P groups of G episodes.

    Attributes:
        keep_PG: bool of shape (P, G): the episodes that the policy learns from. False where an episode has no reward.
        rated_PG: bool of shape (P, G): the episodes that have a reward.
        reasons: for each group why it was kept or dropped, in plain words.
    """

    keep_PG: Bools
    rated_PG: Bools
    reasons: tuple[str, ...]

    @property
    def keep_P(self) -> Bools:
        """bool of shape (P,): groups of which anything is kept."""
        return np.asarray(self.keep_PG.any(axis=1))

    @property
    def share(self) -> float:
        """Share of the episodes with a reward that is kept; 1 where there are none, as nothing was turned down."""
        return self._share(self.rated_PG.sum(axis=1))

    def of(self, groups: NDArray[np.integer]) -> Kept:
        """What it says of some of the groups, by number."""
        return Kept(self.keep_PG[groups], self.rated_PG[groups], tuple(self.reasons[group] for group in groups))

    def share_of_step(self, groups: int) -> float:
        """The share of a step that was to have so many groups, however many were played to fill it.

        What a full step is measured by are the groups that are in it, and not those that they came in place of. Of a
        step that is not full, as many of the others count as are missing; those in which everything failed come last.
        """
        rated_P = self.rated_PG.sum(axis=1)
        first_P = np.argsort(np.where(self.keep_P, 0, np.where(rated_P > 0, 1, 2)), kind="stable")
        return self._share(rated_P[first_P[: max(groups, int(self.keep_P.sum()))]])

    def _share(self, rated_P: NDArray[np.integer]) -> float:
        rated = int(rated_P.sum())
        return float(self.keep_PG.sum()) / rated if rated else 1.0


class Filter(Protocol):
    """Rewards in, :class:`Kept` out."""

    def __call__(self, rewards_PG: ArrayLike, rng: np.random.Generator | None = None) -> Kept:
        """Look at a batch.

        Args:
            rewards_PG: rewards of P groups of G episodes; NaN where an episode failed or does not exist.
            rng: for filters that draw; a fixed one if None.
        """


# --- the filters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeepAll:
    """Keeps every episode that has a reward."""

    def __call__(self, rewards_PG: ArrayLike, rng: np.random.Generator | None = None) -> Kept:
        rewards_PG = checked_rewards(rewards_PG)
        return _kept(rewards_PG, np.ones(len(rewards_PG), dtype=bool), ["kept: there is no filter"] * len(rewards_PG))


@dataclass(frozen=True)
class DropConstant:
    """Drops groups whose rewards are all the same."""

    def __call__(self, rewards_PG: ArrayLike, rng: np.random.Generator | None = None) -> Kept:
        rewards_PG = checked_rewards(rewards_PG)
        keep_P = has_variance(rewards_PG)
        words = ["kept: rewards differ" if keep else _CONSTANT for keep in keep_P]
        return _kept(rewards_PG, keep_P, words)


@dataclass(frozen=True)
class TopK:
    """Keeps the groups of largest variance; of equal ones, those that come first.

    Attributes:
        k: how many, if an int, from 1 on; a share of the groups that have any reward, if a float, up to 1.0. Of a share
            the whole part counts, and at least one group.
        include_constant: whether groups without variance may be kept to make up the number (as in the published code).
    """

    k: float = 0.5
    include_constant: bool = False

    def __post_init__(self) -> None:
        if not (self.k >= 1 if self.count is not None else 0 < self.k <= 1):
            raise RecipeError(
                "k of a top_k filter must be a number of groups, such as 4, or a share of them with a point, above 0.0 "
                f"and up to 1.0, not {self.k}."
            )

    @property
    def count(self) -> int | None:
        """How many groups; None for a share of them."""
        return int(self.k) if isinstance(self.k, numbers.Integral) else None

    def __call__(self, rewards_PG: ArrayLike, rng: np.random.Generator | None = None) -> Kept:
        rewards_PG = checked_rewards(rewards_PG)
        variance_P = group_variance(rewards_PG)
        possible_P = _possible(rewards_PG, self.include_constant)
        rated = int((~np.isnan(rewards_PG)).any(axis=1).sum())
        # The slack is for shares that are not what they look like: 0.29 * 100 is 28.999999999999996.
        k = max(1, int(self.k * rated * (1 + _ROUNDING))) if self.count is None else self.count
        order = _largest_first(variance_P, possible_P)
        keep_P = np.zeros(len(rewards_PG), dtype=bool)
        keep_P[order[:k]] = True
        words = _ranked_words(rewards_PG, order, keep_P, "variance", f"of the top {k}")
        return _kept(rewards_PG, keep_P, words)


@dataclass(frozen=True)
class TopP:
    """Keeps the smallest number of groups, largest mass first, that hold at least a share ``p`` of the whole mass.

    With no mass at all nothing is needed to hold its share, so nothing is kept. With ``p = 1`` every group with mass is
    kept. Of equal groups those that come first are kept.

    Attributes:
        p: above 0, at most 1.
        mass: see :func:`variance_mass`.
        include_constant: whether groups without variance take part. It makes a difference to the softmax alone, in
            which they have mass; the published runs had it so.
    """

    p: float = 0.9
    mass: Mass = "variance"
    include_constant: bool = False

    def __post_init__(self) -> None:
        _check_share("top_p", self.p, self.mass)

    def __call__(self, rewards_PG: ArrayLike, rng: np.random.Generator | None = None) -> Kept:
        rewards_PG = checked_rewards(rewards_PG)
        mass_P, possible_P = _masses(rewards_PG, self.mass, self.include_constant)
        order = _largest_first(mass_P, possible_P)
        keep_P = np.zeros(len(rewards_PG), dtype=bool)
        if self.p == 1:
            keep_P[order] = True  # also those whose mass is too small for a sum to show it
        elif len(order):
            so_far = np.cumsum(mass_P[order])
            needed = int(np.searchsorted(so_far, self.p * so_far[-1] * (1 - _ROUNDING), side="left")) + 1
            keep_P[order[:needed]] = True
        what = f"of those that hold {self.p:.0%} of the {self.mass}"
        return _kept(rewards_PG, keep_P, _ranked_words(rewards_PG, order, keep_P, self.mass, what))


@dataclass(frozen=True)
class MinP:
    """Keeps groups whose mass is at least ``p`` times the largest; with no mass at all, none.

    Attributes:
        p: above 0, at most 1.
        mass: see :func:`variance_mass`.
        include_constant: as in :class:`TopP`.
    """

    p: float = 0.2
    mass: Mass = "variance"
    include_constant: bool = False

    def __post_init__(self) -> None:
        _check_share("min_p", self.p, self.mass)

    def __call__(self, rewards_PG: ArrayLike, rng: np.random.Generator | None = None) -> Kept:
        rewards_PG = checked_rewards(rewards_PG)
        mass_P, possible_P = _masses(rewards_PG, self.mass, self.include_constant)
        largest = float(np.where(possible_P, mass_P, 0.0).max(initial=0.0))
        keep_P = possible_P & (mass_P >= self.p * largest * (1 - _ROUNDING))
        order = _largest_first(mass_P, possible_P)
        what = f"with at least {self.p:g} of the largest {self.mass}"
        return _kept(rewards_PG, keep_P, _ranked_words(rewards_PG, order, keep_P, self.mass, what))


@dataclass(frozen=True)
class RandomLike:
    """Keeps as many groups as another filter would, drawn at random among those that have a reward.

    Where the other keeps some episodes of a group, as many are drawn here.

    What this does as well as the other, the other's choice is not the reason for.

    Attributes:
        other: the filter that says how many.
    """

    other: Filter = field(default_factory=TopP)

    def __call__(self, rewards_PG: ArrayLike, rng: np.random.Generator | None = None) -> Kept:
        rewards_PG = checked_rewards(rewards_PG)
        rng = np.random.default_rng(0) if rng is None else rng
        other = self.other(rewards_PG, rng)
        count = int(other.keep_P.sum())
        present_PG = ~np.isnan(rewards_PG)
        rated = np.flatnonzero(present_PG.any(axis=1))
        keep_P = np.zeros(len(rewards_PG), dtype=bool)
        keep_P[rng.choice(rated, size=count, replace=False)] = True
        words = [f"{'kept' if keep else 'dropped'}: drawn at random, {count} of {len(rated)}" for keep in keep_P]
        dropped = present_PG[other.keep_P].sum(axis=1) - other.keep_PG[other.keep_P].sum(axis=1)
        keep_PG = np.repeat(keep_P[:, None], rewards_PG.shape[1], axis=1)
        if dropped.any():
            for group, without in zip(rng.permutation(np.flatnonzero(keep_P)), dropped, strict=True):
                present = np.flatnonzero(present_PG[group])
                without = min(int(without), len(present) - 1)
                keep_PG[group, rng.choice(present, size=without, replace=False)] = False
        return _kept(rewards_PG, keep_P, words, keep_PG)


@dataclass(frozen=True)
class Extremes:
    """Keeps the best and the worst episodes of each group; all of a group that has no more than these.

    The advantages stay those of the whole group. Of equal rewards the episodes that come first are kept. A group
    without variance has neither best nor worst and is dropped.

    Attributes:
        top, bottom: how many; one of them may be 0.
    """

    top: int = 2
    bottom: int = 2

    def __post_init__(self) -> None:
        for name, number in (("top", self.top), ("bottom", self.bottom)):
            if number < 0:
                raise RecipeError(f"{name} of an extremes filter must be a number of episodes from 0 on, not {number}.")
        if self.top + self.bottom == 0:
            raise RecipeError(
                "An extremes filter keeps at least one episode of a group: set top or bottom to 1 or more."
            )

    def __call__(self, rewards_PG: ArrayLike, rng: np.random.Generator | None = None) -> Kept:
        rewards_PG = checked_rewards(rewards_PG)
        keep_P = has_variance(rewards_PG)
        keep_PG = np.zeros(rewards_PG.shape, dtype=bool)
        words = []
        for p, keep in enumerate(keep_P):
            if not keep:
                words.append(_CONSTANT)
                continue
            present = np.flatnonzero(~np.isnan(rewards_PG[p]))
            best_first = present[np.argsort(-rewards_PG[p, present], kind="stable")]
            worst_first = present[np.argsort(rewards_PG[p, present], kind="stable")]
            keep_PG[p, best_first[: self.top]] = True
            keep_PG[p, worst_first[: self.bottom]] = True
            words.append(f"kept: its best {self.top} and its worst {self.bottom} episodes")
        return _kept(rewards_PG, keep_P, words, keep_PG)


FILTERS: dict[str, type[Any]] = {
    "none": KeepAll,
    "constant": DropConstant,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
    "random": RandomLike,
    "extremes": Extremes,
}
"""The filters by the name that a recipe gives them."""


def make_filter(name: str, **options: Any) -> Filter:
    """A filter by name.

    Args:
        name: a key of :data:`FILTERS`.
        options: its attributes by name. For ``random``, ``like`` names the other filter and the rest is for that one.

    Raises:
        RecipeError: for an unknown name, an unknown option or a value out of range.
    """
    if name not in FILTERS:
        raise RecipeError(f"There is no filter {name!r}; there are {', '.join(FILTERS)}.")
    if name == "random":
        like = options.pop("like", "top_p")
        if like is None or like == "none":  # recipes make None of the word
            raise RecipeError(
                "A random filter like none would keep everything: name the filter that it is the control of as `like`, "
                "or set filter.name to none."
            )
        if not isinstance(like, str):
            raise RecipeError(f"Option like of the filter random must be the name of another filter, not {like!r}.")
        if like == "random":
            raise RecipeError("A random filter keeps as many groups as some other filter; name that one as `like`.")
        return RandomLike(make_filter(like, **options))
    known = {f.name: f.default for f in FILTERS[name].__dataclass_fields__.values()}
    for option, value in options.items():
        if option not in known:
            there = f"there are {', '.join(known)}" if known else "it has none"
            raise RecipeError(f"The filter {name} has no option {option!r}; {there}.")
        _check_option(name, option, value, known[option])
    made: Filter = FILTERS[name](**options)
    return made


def most_groups(choose: Filter) -> int | None:
    """The number of groups that a filter never keeps more than, however many it is shown; None if there is none."""
    if isinstance(choose, RandomLike):
        return most_groups(choose.other)
    return choose.count if isinstance(choose, TopK) else None


def within_families(
    choose: Filter, rewards_PG: ArrayLike, families: Sequence[int] | None, rng: np.random.Generator
) -> Kept:
    """What a filter keeps where several environments are mixed: it looks at each by itself.

    Rewards of different environments have different scales. Compared with each other, the groups of one that pays tens
    would all come before those of one that pays ones.

    Args:
        choose: the filter.
        rewards_PG: as a filter takes them.
        families: for each group its environment; one for all if None.
        rng: for filters that draw.
    """
    rewards_PG = checked_rewards(rewards_PG)
    if families is None:
        return choose(rewards_PG, rng)
    families_P = np.asarray(families)
    keep_PG, rated_PG = np.zeros((2, *rewards_PG.shape), dtype=bool)
    reasons = [""] * len(rewards_PG)
    for family in np.unique(families_P):
        members = np.flatnonzero(families_P == family)
        kept = choose(rewards_PG[members], rng)
        keep_PG[members], rated_PG[members] = kept.keep_PG, kept.rated_PG
        for group, reason in zip(members, kept.reasons, strict=True):
            reasons[group] = reason
    return Kept(keep_PG, rated_PG, tuple(reasons))


def at_most(kept: Kept, count: int) -> Kept:
    """The same with no more than ``count`` groups: those that come first. For batches that were filled up."""
    surplus = np.flatnonzero(kept.keep_P)[count:]
    keep_PG = kept.keep_PG.copy()
    keep_PG[surplus] = False
    reasons = list(kept.reasons)
    for group in surplus:
        reasons[group] = "dropped: the step has enough groups without it"
    return Kept(keep_PG, kept.rated_PG, tuple(reasons))


def loss_scale(kept: Kept, scaling: LossScaling, groups: int) -> float:
    """What the policy's loss is multiplied by after filtering.

    A mean over what was kept is as large as one over everything, so a step with few episodes moves as far as a full
    one. ``share`` multiplies by the kept share (RAGEN-2, which counts groups), ``sqrt`` by its root (VAGEN's code).
    Counted are episodes, as a filter may keep some of a group, and those alone that have a reward: what failed was not
    filtered.

    Args:
        kept: what the filter says.
        scaling: how.
        groups: that the step was to have, see :meth:`Kept.share_of_step`.
    """
    share = kept.share_of_step(groups)
    return {"none": 1.0, "share": share, "sqrt": share**0.5}[scaling]


# --- shared by the filters --------------------------------------------------------------------------------------------

_CONSTANT = "dropped: all its rewards are equal"


def _kept(rewards_PG: NDArray[np.float64], keep_P: Bools, words: list[str], keep_PG: Bools | None = None) -> Kept:
    present_PG = ~np.isnan(rewards_PG)
    rated_P: Bools = np.asarray(present_PG.any(axis=1))
    if keep_PG is None:
        keep_PG = np.repeat(keep_P[:, None], rewards_PG.shape[1], axis=1)
    unrated = "dropped: none of its episodes has a reward"
    reasons = [word if rated else unrated for word, rated in zip(words, rated_P, strict=True)]
    return Kept(keep_PG & present_PG, present_PG, tuple(reasons))


def _possible(rewards_PG: NDArray[np.float64], include_constant: bool) -> Bools:
    if include_constant:
        return np.asarray((~np.isnan(rewards_PG)).any(axis=1))
    return has_variance(rewards_PG)


def _masses(rewards_PG: NDArray[np.float64], mass: Mass, include_constant: bool) -> tuple[NDArray[np.float64], Bools]:
    """Masses, and the groups that take part. Only those share a softmax."""
    possible_P = _possible(rewards_PG, include_constant)
    mass_P = np.zeros(len(rewards_PG))
    mass_P[possible_P] = variance_mass(rewards_PG[possible_P], mass)
    # A softmax gives groups without variance a mass too; elsewhere they have none, and what has none is not kept.
    return mass_P, possible_P if mass == "softmax" else possible_P & has_variance(rewards_PG)


def _largest_first(mass_P: NDArray[np.float64], possible_P: Bools) -> NDArray[np.int64]:
    """Numbers of the possible groups by falling mass. Masses that differ by rounding alone are equal."""
    numbers = np.flatnonzero(possible_P)
    if not len(numbers):
        return numbers
    largest = float(mass_P[numbers].max())
    exponent = np.floor(np.log2(largest)) if largest > 0 else 0.0
    rounded = np.round(mass_P[numbers] / 2.0**exponent, 11)
    return numbers[np.argsort(-rounded, kind="stable")]


def _ranked_words(
    rewards_PG: NDArray[np.float64], order: NDArray[np.int64], keep_P: Bools, mass: str, what: str
) -> list[str]:
    """The reasons of a filter that ranks; ``order`` holds the groups that took part, and whoever is not in it has no
    variance."""
    rank = {int(group): number + 1 for number, group in enumerate(order)}
    alike_P = ~has_variance(rewards_PG)
    words = []
    for group in range(len(rewards_PG)):
        if group not in rank:
            words.append(_CONSTANT)
        elif keep_P[group]:
            alike = " (its rewards are all equal)" if alike_P[group] else ""
            words.append(f"kept: number {rank[group]} by {mass}, {what}{alike}")
        else:
            words.append(f"dropped: number {rank[group]} by {mass}, not {what}")
    return words


def _check_share(name: str, p: float, mass: str) -> None:
    if not 0 < p <= 1:
        raise RecipeError(f"p of a {name} filter must lie above 0 and at most at 1, not {p}.")
    if mass not in MASSES:
        raise RecipeError(f"There is no mass {mass!r}; choose one of {', '.join(MASSES)}.")


def _check_option(name: str, option: str, value: Any, default: Any) -> None:
    wanted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
        kind = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[type(default)]
        raise RecipeError(f"Option {option} of the filter {name} must be {kind}, not {value!r}.")
