"""The estimators against policies whose information is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rehearsal.diagnostics import Information, SmoothedDeviation, information


def sample(
    conditional_MZ: np.ndarray, thoughts: int, rng: np.random.Generator, per_prompt: int = 1
) -> tuple[Information, float]:
    """The estimate from thoughts drawn from a policy p(z | x) over M prompts that are equally frequent, and the truth.

    Args:
        conditional_MZ: a row of probabilities for each prompt.
        thoughts: draws, the same number for each prompt.
    """
    m, z = conditional_MZ.shape
    own_N = np.repeat(np.arange(m), thoughts // m)
    drawn_N = np.array([rng.choice(z, p=conditional_MZ[x]) for x in own_N])
    with np.errstate(divide="ignore"):
        scores_NM = np.log(conditional_MZ)[:, drawn_N].T
    scores_NM = np.maximum(scores_NM, -1e4)  # what a thought that a prompt never gives would have as a score
    joint_MZ = conditional_MZ / m
    marginal_Z = joint_MZ.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        truth = float(np.nansum(joint_MZ * np.log(conditional_MZ / marginal_Z)))
    return information(scores_NM, own_N), truth


def template_mixture(prompts: int, share: float) -> np.ndarray:
    """With probability ``share`` the thought names its prompt, else it is the one template."""
    conditional = np.zeros((prompts, prompts + 1))
    conditional[:, 0] = 1 - share
    conditional[np.arange(prompts), np.arange(prompts) + 1] = share
    return conditional


@pytest.mark.parametrize("prompts", [2, 16])
def test_thoughts_that_ignore_the_prompt_have_none(prompts: int) -> None:
    rng = np.random.default_rng(0)
    conditional = np.tile(rng.dirichlet(np.ones(50)), (prompts, 1))
    found, truth = sample(conditional, 64, rng)
    assert truth == pytest.approx(0.0, abs=1e-12)
    assert found.mutual_information == pytest.approx(0.0, abs=1e-12)
    assert found.retrieval == pytest.approx(found.chance)
    assert not found.saturated
    assert found.conditional_entropy > 2.0, "they are varied all the same"


@pytest.mark.parametrize("prompts", [2, 7, 32])
def test_thoughts_that_are_their_prompt_have_all_there_is(prompts: int) -> None:
    found, truth = sample(np.eye(prompts), 4 * prompts, np.random.default_rng(0))
    assert truth == pytest.approx(math.log(prompts))
    assert found.mutual_information == pytest.approx(math.log(prompts))
    assert found.ceiling == pytest.approx(math.log(prompts))
    assert found.conditional_entropy == pytest.approx(0.0)
    assert found.retrieval == 1.0
    assert found.saturated


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("prompts", [4, 16])
def test_mixtures_with_an_analytic_value(prompts: int, share: float) -> None:
    """I = share ln M: only a thought that is not the template says anything, and it says all."""
    found, truth = sample(template_mixture(prompts, share), 4096, np.random.default_rng(1))
    assert truth == pytest.approx(share * math.log(prompts))
    # Within five percent, or as far off as the draw of templates allows.
    error = math.log(prompts) * math.sqrt(share * (1 - share) / 4096)
    assert found.mutual_information == pytest.approx(truth, rel=0.05, abs=3 * error)
    assert found.retrieval == pytest.approx(share + (1 - share) / prompts, abs=0.03)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sharpness", [0.05, 0.3, 3.0])
def test_policies_at_random_and_their_interval(seed: int, sharpness: float) -> None:
    rng = np.random.default_rng(seed)
    conditional = rng.dirichlet(np.full(40, sharpness), size=24)
    found, truth = sample(conditional, 24 * 200, rng)
    assert found.mutual_information == pytest.approx(truth, rel=0.05, abs=0.01)


def test_the_interval_holds_the_truth_nine_times_of_ten_or_more() -> None:
    """A small sample, as a run has: thoughts of many prompts, a few each, and prompts drawn from more."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        found, truth = sample(template_mixture(32, 0.4), 64, rng)
        covered += abs(found.mutual_information - truth) <= 1.96 * found.standard_error
    assert covered >= 88


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 6)), elements=st.floats(-400, 0)),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_entropy_is_the_sum_of_its_parts(scores_NM: np.ndarray, data: st.DataObject) -> None:
    n, m = scores_NM.shape
    own = data.draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n))
    lengths = data.draw(st.none() | st.lists(st.integers(0, 30), min_size=n, max_size=n))
    found = information(scores_NM, own, lengths)
    assert found.entropy == pytest.approx(found.conditional_entropy + found.mutual_information, rel=1e-12, abs=1e-9)
    assert found.mutual_information <= found.ceiling + 1e-9
    assert 0 <= found.retrieval <= 1
    order = data.draw(st.permutations(range(n)))
    again = information(
        scores_NM[order], [own[i] for i in order], None if lengths is None else [lengths[i] for i in order]
    )
    assert again.mutual_information == pytest.approx(found.mutual_information, rel=1e-9, abs=1e-9)
    assert again.retrieval == pytest.approx(found.retrieval)


def test_the_published_definition_mixes_scores_a_token() -> None:
    """Two thoughts of ten tokens: told apart with certainty as sequences, hardly a token."""
    scores = np.array([[-10.0, -30.0], [-30.0, -10.0]])
    whole = information(scores, [0, 1])
    each = information(scores, [0, 1], [10, 10])
    assert whole.mutual_information == pytest.approx(math.log(2), abs=1e-6)
    assert each.mutual_information == pytest.approx(-1.0 - math.log((math.exp(-1) + math.exp(-3)) / 2))
    assert each.conditional_entropy == pytest.approx(1.0)


def test_z_score() -> None:
    scores = np.array([[-1.0, -5.0], [-9.0, -2.0], [-1.5, -4.0]])
    found = information(scores, [0, 1, 0])
    marginal = np.log(np.exp(scores) @ np.array([2 / 3, 1 / 3]))
    gain = scores[[0, 1, 2], [0, 1, 0]] - marginal
    assert found.z_score == pytest.approx(gain.mean() / (marginal.std() + 1e-3))
    smoothed = SmoothedDeviation()
    assert smoothed.update(2.0) == 2.0
    assert smoothed.update(1.0) == pytest.approx(1.9)
    assert found.smoothed_z_score(1.9) == pytest.approx(found.mutual_information / 1.901)


def test_prompts_that_are_not_equally_frequent() -> None:
    """The ceiling is the entropy of the prompts in the sample."""
    found = information(np.where(np.eye(2)[[0, 0, 0, 1]] > 0, 0.0, -1e3), [0, 0, 0, 1])
    assert found.ceiling == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert found.mutual_information == pytest.approx(found.ceiling)


def test_a_single_prompt_says_nothing_either_way() -> None:
    found = information([[-3.0], [-4.0]], [0, 0])
    assert found.mutual_information == 0.0
    assert math.isnan(found.share)
    assert math.isnan(found.standard_error)
    assert not found.saturated
    assert found.retrieval == found.chance == 1.0


@pytest.mark.parametrize(
    ("scores", "own"),
    [
        (np.empty((0, 3)), []),
        (np.zeros((2, 0)), [0, 0]),
        (np.zeros(3), [0, 0, 0]),
        (np.zeros((2, 2)), [0]),
        (np.zeros((2, 2)), [0, 2]),
        (np.zeros((2, 2)), [-1, 0]),
        (np.array([[0.0, math.nan]]), [0]),
        (np.array([[0.0, -math.inf]]), [0]),
    ],
)
def test_tables_that_cannot_be_read(scores: np.ndarray, own: list[int]) -> None:
    with pytest.raises(ValueError, match=r"scores_NM|finite|own_N"):
        information(scores, own)
