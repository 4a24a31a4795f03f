"""How much of the gradient is signal: gradients of single groups, compared.

Groups are ordered by the variance of their rewards and cut into quantiles; of each a few groups are drawn, and the
gradient of every objective is taken for each group alone. With g_1..g_n of norm |g_i|, independent and of one mean,

    signal^2 = (|sum g_i|^2 - sum |g_i|^2) / (n (n - 1))      unbiased for |E g|^2; cut at 0
    noise^2  = mean |g_i|^2 - signal^2                        how far a group is from that mean

inside a quantile. Quantiles have means of their own, so over all of them what chance adds to |sum g_i|^2 is estimated
inside each, (n sum |g_i|^2 - |sum g_i|^2) / (n - 1), and taken off; that needs two groups of each. The
signal-to-noise ratio is that of one group; a step of P groups has sqrt(P) times it. (RAGEN-2 measures gradient
norms by quantile in the same way; its bound says that the signal grows with the root of the variance, and that what
pulls equally in all groups, KL and entropy terms, takes over where there is little.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


@dataclass
class GradientSums:
    """The gradients of some groups by one objective, without keeping them.

    Attributes:
        count: groups.
        squares: sum of the squared norms.
        total: sum of the gradients, one tensor a parameter; None where no group had one.
        quantiles: where the groups come from several quantiles, what chance adds to the squared norm of the total,
            summed over these; None for groups of one mean.
    """

    count: int = 0
    squares: float = 0.0
    total: list[Tensor | None] = field(default_factory=list)
    quantiles: float | None = None

    def add(self, gradients: Gradients) -> None:
        """Take in the gradient of another group."""
        self.count += 1
        self.squares += _squared_norm(gradients)
        if not self.total:
            self.total = [None] * len(gradients)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                held = self.total[i]
                self.total[i] = gradient.detach().clone() if held is None else held.add_(gradient.detach())

    @property
    def norm(self) -> float:
        """Root of the mean squared norm of a group's gradient."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan

    @property
    def signal(self) -> float:
        """Norm of the mean gradient, estimated; NaN for fewer than two groups."""
        chance = self.chance
        return math.nan if math.isnan(chance) else math.sqrt(max(0.0, _squared_norm(self.total) - chance)) / self.count

    @property
    def chance(self) -> float:
        """What chance adds to the squared norm of the total, estimated; NaN for fewer than two groups."""
        if self.quantiles is not None:
            return self.quantiles
        if self.count < 2:
            return math.nan
        return (self.count * self.squares - _squared_norm(self.total)) / (self.count - 1)

    @property
    def snr(self) -> float:
        """Signal over noise of a single group; NaN for fewer than two groups or where there is no gradient at all."""
        signal = self.signal
        if math.isnan(signal) or self.squares == 0:
            return math.nan
        noise = math.sqrt(max(0.0, self.squares / self.count - signal**2))
        return signal / noise if noise > 0 else math.inf


def _squared_norm(gradients: Gradients) -> float:
    return sum(float(torch.linalg.vector_norm(g.float()) ** 2) for g in gradients if g is not None)


def draw_by_quantile(
    variance_P: np.ndarray, candidates: Sequence[int], quantiles: int, each: int, rng: np.random.Generator
) -> list[list[int]]:
    """Groups of every quantile of variance, ``each`` of them at most, drawn at random; lowest variance first."""
    order = sorted(candidates, key=lambda p: (variance_P[p], p))
    parts = np.array_split(np.asarray(order, dtype=np.int64), quantiles)
    return [sorted(rng.permutation(part)[:each].tolist()) for part in parts]


def gradient_figures(
    drawn: Sequence[Sequence[int]], variance_P: np.ndarray, one_by_one: Iterator[Mapping[str, Gradients]]
) -> dict[str, float]:
    """Norms and signal-to-noise ratios, over all drawn groups and by quantile.

    Args:
        drawn: numbers of groups by quantile.
        variance_P: in-group variance of the rewards.
        one_by_one: for each drawn group in order the gradient of each objective, by its name.

    Returns:
        ``gradient/OBJECTIVE/norm``, ``/signal``, ``/snr``; the same with ``/qK`` for quantile K from 1 (least
        variance); ``gradient/variance/qK``, the mean variance there. What cannot be told is left out: signal and ratio
        over all quantiles where one of them gave a single group.
    """
    overall: dict[str, GradientSums] = {}
    figures: dict[str, float] = {}
    for number, groups in enumerate(drawn, start=1):
        if not groups:
            continue
        here: dict[str, GradientSums] = {}
        for _ in groups:
            for name, gradients in next(one_by_one).items():
                here.setdefault(name, GradientSums()).add(gradients)
                overall.setdefault(name, GradientSums(quantiles=0.0)).add(gradients)
        figures[f"gradient/variance/q{number}"] = float(variance_P[list(groups)].mean())
        for name, sums in here.items():
            pooled = overall[name]
            assert pooled.quantiles is not None
            pooled.quantiles += sums.chance
            figures |= _figures(f"gradient/{name}", sums, f"/q{number}")
    for name, sums in overall.items():
        figures |= _figures(f"gradient/{name}", sums, "")
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _figures(prefix: str, sums: GradientSums, suffix: str) -> dict[str, float]:
    return {f"{prefix}/{name}{suffix}": float(getattr(sums, name)) for name in ("norm", "signal", "snr")}
