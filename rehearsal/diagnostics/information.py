"""Does the reasoning still depend on what it answers? Mutual information of prompts X and thoughts Z.

Every thought of a sample is scored under every prompt of it. With the log-likelihoods ``scores_NM`` of N thoughts under
M prompts, and the prompt that each thought was really an answer to,

    matched_i  = log p(z_i | x_own)
    marginal_i = log sum_j w_j p(z_i | x_j)            w_j: the share of prompt j in the sample
    I(X;Z)     = mean(matched) - mean(marginal)
    H(Z|X)     = -mean(matched)
    H(Z)       = -mean(marginal) = H(Z|X) + I(X;Z)

in nats. This is the paper's definition (RAGEN-2), of whole sequences. It is at most H(X), which is ln M where all
prompts are as frequent, and it reaches that ceiling as soon as thoughts tell prompts apart at all, so a value near it
says "at least this much". The published code divides every log-likelihood by the length of the thought first and mixes
those, which is another, much smaller quantity without that ceiling; it is the one called ``per_token`` here, and is
comparable between runs of the same thought lengths.

Thoughts that all prompts explain equally well have I = 0 however varied they are: the template collapse that entropy
does not see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

SATURATED = 0.95
"""An estimate above this share of its ceiling says no more than that the prompts can be told apart."""
Z_FLOOR = 1e-3
"""Added to the deviation of the z-score, as published."""


@dataclass(frozen=True)
class Information:
    """What a sample of thoughts says about its prompts; nats, or nats a token for ``per_token``.

    Attributes:
        mutual_information: I(X;Z).
        conditional_entropy: H(Z|X).
        entropy: H(Z), the sum of the two.
        standard_error: of I(X;Z); prompts count as the independent ones. NaN for a single prompt.
        z_score: mean(matched - marginal) over the standard deviation of the marginal among thoughts (plus 0.001).
        marginal_deviation: that standard deviation, for smoothing over steps.
        retrieval: share of thoughts whose own prompt scores them best; a tie is shared among the tied.
        chance: what retrieval would be by guessing.
        ceiling: H(X), the most that I(X;Z) can be in a sample of these prompts.
        thoughts: N.
        prompts: M, distinct ones.
    """

    mutual_information: float
    conditional_entropy: float
    entropy: float
    standard_error: float
    z_score: float
    marginal_deviation: float
    retrieval: float
    chance: float
    ceiling: float
    thoughts: int
    prompts: int

    @property
    def saturated(self) -> bool:
        """Whether the estimate is so near its ceiling that the truth may lie far above."""
        return self.ceiling > 0 and self.mutual_information >= SATURATED * self.ceiling

    @property
    def share(self) -> float:
        """I(X;Z) over its ceiling, from 0 (the thought says nothing of the prompt) to 1; NaN for a single prompt."""
        return self.mutual_information / self.ceiling if self.ceiling > 0 else math.nan

    def smoothed_z_score(self, deviation: float) -> float:
        """The z-score with a deviation that was averaged over steps, see :class:`SmoothedDeviation`."""
        return self.mutual_information / (deviation + Z_FLOOR)

    def figures(self, prefix: str) -> dict[str, float]:
        """What differs between the definitions, as metrics; see :func:`sample_figures` for the rest."""
        names = ("mutual_information", "conditional_entropy", "entropy", "standard_error", "z_score", "retrieval")
        values = {f"{prefix}/{name}": float(getattr(self, name)) for name in names}
        return values | {f"{prefix}/saturated": float(self.saturated), f"{prefix}/share": self.share}

    def sample_figures(self, prefix: str) -> dict[str, float]:
        """What the sample alone fixes: its size, what guessing would give and the most that can be found."""
        return {f"{prefix}/{name}": float(getattr(self, name)) for name in ("thoughts", "prompts", "chance", "ceiling")}


@dataclass
class SmoothedDeviation:
    """The deviation of the marginal as an exponential average over steps, as published (decay 0.9).

    Attributes:
        decay: weight of the past.
        value: the average so far; None before the first.
    """

    decay: float = 0.9
    value: float | None = None

    def update(self, deviation: float) -> float:
        """Take in the deviation of another step; returns the new average."""
        self.value = deviation if self.value is None else self.decay * self.value + (1 - self.decay) * deviation
        return self.value


def information(
    scores_NM: ArrayLike, own_N: Sequence[int] | NDArray[np.integer], lengths_N: ArrayLike | None = None
) -> Information:
    """The estimates from a table of log-likelihoods.

    Args:
        scores_NM: log p(z_i | x_j) in nats, summed over the tokens of thought i; finite. Columns are distinct prompts.
        own_N: for each thought the column of the prompt that it was an answer to.
        lengths_N: tokens of each thought, for the per-token definition; None for whole sequences. A thought without
            tokens says nothing either way and has a score of 0.

    Raises:
        ValueError: for an empty table, shapes that do not fit or scores that are not finite.
    """
    scores_NM = np.asarray(scores_NM, dtype=np.float64)
    own_N = np.asarray(own_N, dtype=np.int64)
    if scores_NM.ndim != 2 or 0 in scores_NM.shape or own_N.shape != scores_NM.shape[:1]:
        raise ValueError(f"scores_NM must be a table with one own prompt a row, not {scores_NM.shape}, {own_N.shape}")
    if not np.isfinite(scores_NM).all():
        raise ValueError("the log-likelihoods of thoughts must be finite")
    if own_N.min() < 0 or own_N.max() >= scores_NM.shape[1]:
        raise ValueError(f"own_N must lie in 0..{scores_NM.shape[1] - 1}")
    if lengths_N is not None:
        scores_NM = scores_NM / np.maximum(np.asarray(lengths_N, dtype=np.float64), 1.0)[:, None]
    n, m = scores_NM.shape
    weights_M = np.bincount(own_N, minlength=m) / n
    matched_N = scores_NM[np.arange(n), own_N]
    marginal_N = _log_mean_exp(scores_NM, weights_M)
    gain_N = matched_N - marginal_N
    used_M = weights_M[weights_M > 0]
    # The largest scores; a thought that several prompts explain equally well is found by luck.
    best_NM = scores_NM >= scores_NM.max(axis=1, keepdims=True)
    return Information(
        mutual_information=float(gain_N.mean()),
        conditional_entropy=float(-matched_N.mean()),
        entropy=float(-marginal_N.mean()),
        standard_error=_clustered_error(gain_N, own_N),
        z_score=float(gain_N.mean() / (marginal_N.std() + Z_FLOOR)),
        marginal_deviation=float(marginal_N.std()),
        retrieval=float((best_NM[np.arange(n), own_N] / best_NM.sum(axis=1)).mean()),
        chance=1.0 / m,
        ceiling=float(-(used_M * np.log(used_M)).sum()),
        thoughts=n,
        prompts=m,
    )


def _log_mean_exp(scores_NM: Floats, weights_M: Floats) -> Floats:
    """log sum_j w_j exp(s_ij), stable; prompts of weight 0 (drawn, but without a thought) do not count."""
    used = weights_M > 0
    shifted = scores_NM[:, used] + np.log(weights_M[used])
    peak = shifted.max(axis=1)
    total: Floats = peak + np.log(np.exp(shifted - peak[:, None]).sum(axis=1))
    return total


def _clustered_error(values_N: Floats, cluster_N: NDArray[np.integer]) -> float:
    """Standard error of a mean whose entries come in clusters (thoughts to one prompt are alike)."""
    sizes = np.bincount(cluster_N)
    present = sizes > 0
    count = int(present.sum())
    if count < 2:
        return math.nan
    residuals = np.bincount(cluster_N, weights=values_N - values_N.mean())[present]
    return float(np.sqrt((residuals**2).sum() * count / (count - 1)) / len(values_N))


__all__ = ["SATURATED", "Information", "SmoothedDeviation", "information"]
