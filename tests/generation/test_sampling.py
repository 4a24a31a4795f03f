"""Noise and draws: uniform, uncorrelated, true to the softmax, and never a token of probability zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rehearsal.errors import GenerationError, RecipeError
from rehearsal.generation.sampling import SamplingParams, draw, stream_key, truncate, uniforms

INF = float("inf")
LARGEST_UNIFORM = 1.0 - 2.0**-53


def stream_keys(n: int) -> np.ndarray:
    return np.array([stream_key(7, "train", i) for i in range(n)], dtype=np.uint64)


def midpoints(n: int) -> torch.Tensor:
    """n numbers spread evenly over [0, 1): inverting a distribution at them shows it without noise."""
    return torch.from_numpy((np.arange(n) + 0.5) / n)


class TestUniforms:
    def test_are_in_the_unit_interval_and_uniform(self) -> None:
        keys, positions = np.meshgrid(stream_keys(200), np.arange(500))
        numbers = uniforms(keys.ravel(), positions.ravel())
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0
        counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
        # Chi-squared with 99 degrees of freedom: mean 99, standard deviation 14.
        assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 99 + 5 * 14

    def test_do_not_collide(self) -> None:
        keys, positions = np.meshgrid(stream_keys(300), np.arange(1000))
        numbers = uniforms(keys.ravel(), positions.ravel())
        # 53 random bits: the expected number of collisions is 5e-6.
        assert len(np.unique(numbers)) == numbers.size

    @pytest.mark.parametrize("lag", [1, 2, 3, 7])
    def test_neighbours_are_not_correlated(self, lag: int) -> None:
        keys, positions = np.meshgrid(stream_keys(200), np.arange(200), indexing="ij")
        numbers = uniforms(keys.ravel(), positions.ravel()).reshape(200, 200) - 0.5
        within = 12 * (numbers[:, lag:] * numbers[:, :-lag]).mean()
        across = 12 * (numbers[lag:] * numbers[:-lag]).mean()
        # Each is a mean of about 40,000 products of unit variance.
        assert max(abs(within), abs(across)) < 5 / 195

    def test_streams_of_plain_numbers_are_not_correlated_either(self) -> None:
        numbers = uniforms(np.arange(1, 20_001, dtype=np.uint64), np.zeros(20_000, dtype=np.int64)) - 0.5
        assert abs(12 * (numbers[1:] * numbers[:-1]).mean()) < 5 / math.sqrt(20_000)
        assert abs(numbers.mean()) < 5 * math.sqrt(1 / 12 / 20_000)

    def test_depend_on_nothing_but_stream_and_position(self) -> None:
        keys = stream_keys(50)
        together = uniforms(keys, np.arange(50))
        alone = np.concatenate([uniforms(keys[i : i + 1], np.array([i])) for i in range(50)])
        assert np.array_equal(together, alone)

    def test_are_splitmix64(self) -> None:
        # The published first outputs for the seed 1234567.
        words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
        numbers = uniforms(np.full(4, 1234567, dtype=np.uint64), np.arange(4))
        assert numbers.tolist() == [(word >> 11) * 2.0**-53 for word in words]

    @given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
    def test_any_key_will_do(self, key: int, position: int) -> None:
        number = uniforms(np.array([key], dtype=np.uint64), np.array([position]))[0]
        assert 0.0 <= number < 1.0


class TestStreamKey:
    def test_is_a_fixed_function(self) -> None:
        # A change here changes every run that was made with a seed.
        assert stream_key(1, "train", 2) == stream_key("1", "train", "2") != stream_key(1, "train", 3)
        assert stream_key(1, "test", 2) == 11379819385788196907

    def test_keeps_parts_apart(self) -> None:
        assert stream_key(1, 23) != stream_key(12, 3)
        assert 0 <= stream_key("x") < 2**64


class TestDraw:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
    def test_follows_the_softmax(self, temperature: float) -> None:
        logits = torch.tensor([2.0, -1.0, 0.5, 0.5, -4.0, 1.2])
        expected = torch.softmax(logits / temperature, -1)
        ids, logprobs = draw(logits.expand(20_000, -1), midpoints(20_000), SamplingParams(temperature=temperature))
        shares = torch.bincount(ids, minlength=6) / 20_000
        assert torch.allclose(shares, expected, atol=2e-4)
        assert torch.allclose(logprobs, expected.log()[ids], atol=1e-6)

    def test_follows_the_softmax_with_the_noise_that_is_used(self) -> None:
        logits = torch.linspace(-2, 2, 8)
        noise = torch.from_numpy(uniforms(stream_keys(20_000), np.arange(20_000)))
        ids, _ = draw(logits.expand(20_000, -1), noise, SamplingParams())
        shares = torch.bincount(ids, minlength=8) / 20_000
        assert torch.allclose(shares, logits.softmax(-1), atol=5 * math.sqrt(0.25 / 20_000))

    @settings(deadline=None, max_examples=100)
    @given(st.data())
    def test_a_row_does_not_depend_on_the_others(self, data: st.DataObject) -> None:
        rows = data.draw(st.integers(2, 6))
        seed = data.draw(st.integers(0, 1000))
        logits = 3 * torch.randn(rows, 11, generator=torch.Generator().manual_seed(seed))
        noise = torch.from_numpy(np.random.default_rng(seed).random(rows))
        params = SamplingParams(temperature=0.8, top_k=data.draw(st.integers(0, 12)), top_p=0.9)
        ids, logprobs = draw(logits, noise, params)
        for row in range(rows):
            one_id, one_logprob = draw(logits[row : row + 1], noise[row : row + 1], params)
            assert one_id.item() == ids[row].item()
            assert one_logprob.item() == pytest.approx(logprobs[row].item(), abs=1e-6)

    @settings(deadline=None, max_examples=200)
    @given(
        st.lists(
            st.one_of(st.just(-INF), st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-120, 120, width=32)),
            min_size=1, max_size=12,
        ),
        st.lists(st.one_of(st.floats(0, LARGEST_UNIFORM), st.sampled_from([0.0, LARGEST_UNIFORM])), min_size=1,
                 max_size=5),
        st.sampled_from([(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.6), (2.0, 3, 0.5)]),
    )  # fmt: skip
    def test_never_draws_a_token_of_probability_zero(
        self, row: list[float], noise: list[float], distribution: tuple[float, int, float]
    ) -> None:
        if max(row) == -INF:
            row = [*row, 0.0]
        temperature, top_k, top_p = distribution
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        logits = torch.tensor([row] * len(noise))
        ids, logprobs = draw(logits, torch.tensor(noise, dtype=torch.float64), params)
        probabilities = torch.softmax(truncate(logits / temperature, params), -1).gather(1, ids[:, None])[:, 0]
        assert (probabilities > 0).all()
        assert torch.allclose(logprobs.exp(), probabilities, rtol=1e-4)

    def test_the_largest_noise_takes_the_last_possible_token(self) -> None:
        # In float32 this noise is 1: the target equals the total, which the tail of tiny probabilities does not raise.
        logits = torch.tensor([[0.0, 1.0, 0.5, -200.0, -300.0, -INF]])
        ids, logprobs = draw(logits, torch.tensor([LARGEST_UNIFORM], dtype=torch.float64), SamplingParams())
        assert ids.item() == 2
        assert logprobs.item() == pytest.approx(torch.log_softmax(logits, -1)[0, 2].item())

    def test_the_smallest_noise_takes_the_first_possible_token(self) -> None:
        logits = torch.tensor([[-INF, -500.0, 1.0, 2.0]])
        ids, _ = draw(logits, torch.zeros(1, dtype=torch.float64), SamplingParams())
        assert ids.item() == 2

    def test_greedy_takes_the_likeliest_with_certainty(self) -> None:
        logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
        ids, logprobs = draw(logits, torch.rand(5), SamplingParams(temperature=0.0, top_k=3, top_p=0.5))
        assert torch.equal(ids, logits.argmax(-1))
        assert torch.equal(logprobs, torch.zeros(5))

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_says_when_the_model_has_diverged(self, temperature: float) -> None:
        logits = torch.full((2, 5), math.nan)
        with pytest.raises(GenerationError, match="not finite"):
            draw(logits, torch.rand(2), SamplingParams(temperature=temperature))

    def test_bfloat16_logits_give_float32_log_probs(self) -> None:
        logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
        ids, logprobs = draw(logits, midpoints(4), SamplingParams(temperature=0.7))
        assert logprobs.dtype == torch.float32
        expected = torch.log_softmax(logits.float() / 0.7, -1).gather(1, ids[:, None])[:, 0]
        assert torch.allclose(logprobs, expected, atol=1e-6)


class TestTruncation:
    @settings(deadline=None, max_examples=100)
    @given(
        st.integers(0, 10_000), st.integers(0, 25), st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.95, 0.999, 1.0]),
        st.sampled_from([0.3, 1.0, 2.5]),
    )  # fmt: skip
    def test_equals_the_warpers_of_transformers(self, seed: int, top_k: int, top_p: float, temperature: float) -> None:
        logits = 4 * torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        expected = warpers(torch.zeros(3, 1, dtype=torch.long), logits)
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
        assert torch.equal(truncate(logits / temperature, params), expected)
        ids, logprobs = draw(logits, midpoints(3), params)
        assert torch.allclose(logprobs, torch.log_softmax(expected, -1).gather(1, ids[:, None])[:, 0], atol=1e-6)

    def test_top_k_and_top_p_by_hand(self) -> None:
        logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
        kept = truncate(logits, SamplingParams(top_k=3)).isfinite()
        assert kept.tolist() == [[True, False, True, True]]
        # 0.4 + 0.3 does not reach 0.75, so the token of 0.2 is needed.
        kept = truncate(logits, SamplingParams(top_p=0.75)).isfinite()
        assert kept.tolist() == [[True, False, True, True]]
        # Of the two that top-k left, the first alone has 4/7.
        kept = truncate(logits, SamplingParams(top_k=2, top_p=0.5)).isfinite()
        assert kept.tolist() == [[True, False, False, False]]

    def test_log_probs_are_renormalised_over_what_is_left(self) -> None:
        logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
        ids, logprobs = draw(logits.expand(700, -1), midpoints(700), SamplingParams(top_k=2))
        shares = torch.bincount(ids, minlength=4)
        assert shares.tolist() == [400, 0, 300, 0]
        assert torch.allclose(logprobs.exp(), torch.tensor([4 / 7, 0, 3 / 7, 0])[ids], atol=1e-6)

    def test_the_likeliest_token_always_stays(self) -> None:
        kept = truncate(torch.tensor([[0.0, 3.0, 1.0]]), SamplingParams(top_p=1e-9)).isfinite()
        assert kept.tolist() == [[False, True, False]]

    def test_ties_at_the_border_of_top_k_stay(self) -> None:
        kept = truncate(torch.tensor([[1.0, 0.0, 0.0, -1.0]]), SamplingParams(top_k=2)).isfinite()
        assert kept.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1},
              {"max_tokens": 0}],
)  # fmt: skip
def test_params_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_params_know_whether_they_truncate() -> None:
    assert not SamplingParams(temperature=0.5).truncates
    assert SamplingParams(temperature=0).truncates
    assert SamplingParams(top_k=1).truncates
    assert SamplingParams(top_p=0.9).truncates
    assert SamplingParams(0.5, 3, 0.9).distribution == (0.5, 3, 0.9)
