"""Signal and noise of gradients, against draws whose mean and spread are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rehearsal.training.gradient_probe import GradientSums, draw_by_quantile, gradient_figures


def test_signal_and_noise_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((50,), 0.3)
    signals, ratios = [], []
    for _ in range(200):
        sums = GradientSums()
        for _ in range(16):
            gradient = mean + 0.5 * torch.randn(50, generator=generator)
            sums.add([gradient[:20], None, gradient[20:]])
        signals.append(sums.signal)
        ratios.append(sums.snr)
        assert sums.norm > sums.signal
    true_signal = 0.3 * math.sqrt(50)
    assert np.mean(signals) == pytest.approx(true_signal, rel=0.03)
    assert np.mean(ratios) == pytest.approx(true_signal / (0.5 * math.sqrt(50)), rel=0.05)


def test_equal_gradients_are_all_signal() -> None:
    sums = GradientSums()
    for _ in range(3):
        sums.add([torch.tensor([3.0, 4.0])])
    assert sums.norm == pytest.approx(5.0)
    assert sums.signal == pytest.approx(5.0)
    assert sums.snr > 1e3


def test_opposite_gradients_are_all_noise() -> None:
    sums = GradientSums()
    sums.add([torch.tensor([1.0])])
    sums.add([torch.tensor([-1.0])])
    assert sums.signal == 0.0
    assert sums.snr == 0.0


def test_too_few_groups_or_no_gradient() -> None:
    sums = GradientSums()
    assert math.isnan(sums.norm)
    sums.add([None])
    assert math.isnan(sums.signal)
    sums.add([torch.zeros(2)])
    assert sums.signal == 0.0
    assert math.isnan(sums.snr)


def test_groups_are_drawn_by_variance() -> None:
    variance_P = np.array([0.4, 0.0, 0.1, 0.3, 0.2, 0.0, 0.5, 0.6])
    drawn = draw_by_quantile(variance_P, range(8), 4, 2, np.random.default_rng(0))
    assert drawn == [[1, 5], [2, 4], [0, 3], [6, 7]]
    some = draw_by_quantile(variance_P, [1, 6], 4, 2, np.random.default_rng(0))
    assert some == [[1], [6], [], []]
    few = draw_by_quantile(variance_P, range(8), 2, 1, np.random.default_rng(0))
    assert [len(part) for part in few] == [1, 1]


@pytest.mark.parametrize("each", [2, 4])
def test_quantiles_with_means_of_their_own(each: int) -> None:
    """Only one quartile is alive, as late in a run: the mean over all is a quarter of its."""
    generator = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(400):
        means = [torch.zeros(50)] * 3 + [torch.full((50,), 0.3)]
        drawn = [[4 * k + i for i in range(each)] for k in range(4)]
        one_by_one = [
            {"policy": [mean + 0.1 * torch.randn(50, generator=generator)]} for mean in means for _ in range(each)
        ]
        figures = gradient_figures(drawn, np.zeros(16), iter(one_by_one))
        squares.append(figures["gradient/policy/signal"] ** 2)
    assert np.mean(squares) == pytest.approx((0.3 * math.sqrt(50) / 4) ** 2, rel=0.03)


def test_a_quantile_with_a_single_group_leaves_the_whole_unknown() -> None:
    one_by_one = iter([{"policy": [torch.tensor([float(i)])]} for i in (1, 2, 3)])
    figures = gradient_figures([[0, 1], [2]], np.zeros(3), one_by_one)
    assert figures["gradient/policy/signal/q1"] == pytest.approx(math.sqrt(2))
    assert "gradient/policy/norm" in figures
    assert "gradient/policy/signal" not in figures and "gradient/policy/snr" not in figures


def test_figures() -> None:
    gradients = iter([{"policy": [torch.tensor([float(i)])], "kl": [None]} for i in (1, 2, 3)])
    figures = gradient_figures([[4, 2], [], [0]], np.array([0.9, 0, 0.2, 0, 0.4]), gradients)
    assert figures["gradient/variance/q1"] == pytest.approx(0.3)
    assert figures["gradient/variance/q3"] == pytest.approx(0.9)
    assert figures["gradient/policy/norm/q1"] == pytest.approx(math.sqrt(2.5))
    assert figures["gradient/policy/norm"] == pytest.approx(math.sqrt(14 / 3))
    assert figures["gradient/kl/norm"] == 0.0
    assert "gradient/kl/snr" not in figures
    assert all(math.isfinite(value) for value in figures.values())
