"""Several samples of each task: pass@k, majority vote, best of n, and two policies on the same tasks.

P tasks, N samples of each.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from rehearsal.errors import RecipeError
from rehearsal.evaluation.statistics import mean_interval
from rehearsal.trajectory import Group, Trajectory

_RESAMPLES = 10_000


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that at least one of k samples is right, without bias from the samples at hand.

    1 - C(n - c, k) / C(n, k) (Chen et al., arXiv:2107.03374; as a product, which does not overflow). The plug-in
    estimate 1 - (1 - c/n)^k is too low.

    Args:
        samples: n, how many there are.
        right: c, how many of them are right.
        k: how many may be drawn, at most n.

    Raises:
        ValueError: for numbers that do not go together.
    """
    _check(samples, right, k)
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def pass_hat_k(samples: int, right: int, k: int) -> float:
    """The probability that all of k samples are right, C(c, k) / C(n, k): what one can rely on (tau-bench,
    arXiv:2406.12045). Arguments and errors as for :func:`pass_at_k`."""
    _check(samples, right, k)
    return math.comb(right, k) / math.comb(samples, k)


def best_of_n(proxies: Sequence[float], values: Sequence[float], n: int) -> float:
    """The expected value of what a verifier picks out of n samples, without bias from the samples at hand.

    Of N samples in ascending order of the verifier's score the i-th is the pick of n random ones with probability
    C(i - 1, n - 1) / C(N, n). Samples of equal score are picked with equal probability.

    Args:
        proxies: the verifier's scores, N of them.
        values: what each sample is really worth.
        n: samples that are picked from, 1 to N.

    Raises:
        ValueError: for numbers that do not go together.
    """
    if len(proxies) != len(values):
        raise ValueError(f"there are {len(proxies)} scores for {len(values)} samples")
    total = len(values)
    _check(total, total, n)
    order = np.argsort(proxies, kind="stable")
    weights = np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])
    sorted_proxies = np.asarray(proxies, dtype=np.float64)[order]
    # The weight of samples with equal scores is theirs together.
    _, inverse = np.unique(sorted_proxies, return_inverse=True)
    shared = np.bincount(inverse, weights) / np.bincount(inverse)
    return float((shared[inverse] * np.asarray(values, dtype=np.float64)[order]).sum())


def majority(answers: Sequence[str]) -> str | None:
    """The answer that most samples gave, in its first spelling; of equally frequent ones the first. None if there is no
    answer. Numbers are compared by their value, other answers without case and blanks."""
    plain = [_ballot(answer) for answer in answers]
    counts = Counter(answer for answer in plain if answer)
    if not counts:
        return None
    most = max(counts.values())
    return next(answer for answer, ballot in zip(answers, plain, strict=True) if counts[ballot] == most)


_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?|[+-]?\.\d+")


def _ballot(answer: str) -> str:
    """What an answer votes for."""
    plain = " ".join(answer.casefold().split())
    if len(plain) <= 100 and _NUMBER.fullmatch(plain):
        return str(Fraction(plain.replace(",", "")))
    return plain


def sample_figures(groups: Sequence[Group]) -> dict[str, float]:
    """What several episodes of each task say together. Tasks with fewer finished episodes than others count for the k
    that they have.

    Returns:
        for k = 1, 2, 4, ... up to the number of samples ``pass@k`` and ``pass^k``, each with its 95% bootstrap interval
        over tasks (``pass@k/low``, ``pass@k/high``); ``majority@n`` where no episode has more than one answer: those
        without one have no vote, and a task without votes is not solved. Nothing where success is not known.
    """
    played = [[one for one in group if not one.failed and one.success is not None] for group in groups]
    played = [episodes for episodes in played if episodes]
    if not played:
        return {}
    counts = [(len(episodes), sum(bool(one.success) for one in episodes)) for episodes in played]
    most = max(n for n, _ in counts)
    figures: dict[str, float] = {}
    measures: Mapping[str, Callable[[int, int, int], float]] = {"pass@": pass_at_k, "pass^": pass_hat_k}
    for k in counts_up_to(most):
        for name, measure in measures.items():
            values = [measure(n, c, k) for n, c in counts if n >= k]
            mean, low, high = mean_interval(values)
            figures |= {f"{name}{k}": mean, f"{name}{k}/low": low, f"{name}{k}/high": high}
    if all(len(_actions(one)) <= 1 for episodes in played for one in episodes):
        mean, low, high = mean_interval([_majority_is_right(episodes) for episodes in played])
        figures |= {f"majority@{most}": mean, f"majority@{most}/low": low, f"majority@{most}/high": high}
    return figures


def counts_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    counts = [2**i for i in range(max(0, most).bit_length())]
    return counts if not counts or counts[-1] == most else [*counts, most]


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same tasks.

    Attributes:
        difference: mean of the first less mean of the second.
        low, high: its 95% bootstrap interval over tasks.
        p_value: how often chance alone would make a difference as large, if the policies were alike (two-sided, by
            flipping signs of the tasks' differences).
        tasks: that both played.
        better, worse: tasks in which the first is better, and worse.
    """

    difference: float
    low: float
    high: float
    p_value: float
    tasks: int
    better: int
    worse: int


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Compare two policies by what each got in every task, in the same order; NaN where one of them failed.

    Pairing takes out how hard a task is, which is most of what results scatter by.

    Raises:
        RecipeError: if they did not play the same number of tasks, or have none in common.
    """
    if len(first) != len(second):
        raise RecipeError(f"Two policies that played {len(first)} and {len(second)} tasks cannot be compared by task.")
    differences_P = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    differences_P = differences_P[~np.isnan(differences_P)]
    if not len(differences_P):
        raise RecipeError("The two policies have finished no task in common, so they cannot be compared.")
    mean, low, high = mean_interval(differences_P.tolist(), seed)
    rng = np.random.default_rng([seed, 1])
    signs = rng.choice((-1.0, 1.0), (_RESAMPLES, len(differences_P)))
    by_chance = np.abs((signs * differences_P).mean(axis=1)) >= abs(mean) - 1e-12
    return Comparison(
        mean, low, high, float((by_chance.sum() + 1) / (_RESAMPLES + 1)), len(differences_P),
        int((differences_P > 0).sum()), int((differences_P < 0).sum()),
    )  # fmt: skip


def success_by_task(groups: Sequence[Group]) -> list[float]:
    """Share of a task's episodes that succeeded, for each task; NaN where none finished."""
    shares = []
    for group in groups:
        known = [bool(one.success) for one in group if not one.failed and one.success is not None]
        shares.append(sum(known) / len(known) if known else math.nan)
    return shares


def _check(samples: int, right: int, k: int) -> None:
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"k must be 1 to the number of samples: k = {k}, {right} of {samples} samples right")


def _actions(trajectory: Trajectory) -> list[str]:
    return [action for turn in trajectory.turns for action in turn.executed]


def _majority_is_right(episodes: Sequence[Trajectory]) -> float:
    votes = [(answer, one) for one in episodes for answer in _actions(one)]
    chosen = majority([answer for answer, _ in votes])
    return float(next((bool(one.success) for answer, one in votes if answer == chosen), False))
