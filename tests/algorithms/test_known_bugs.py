"""Mistakes that other trainers have shipped, each as a test that such a mistake here would fail.

Those about cutting a step into micro-batches are in test_aggregation.py, those about turns read off non-zero rewards in
test_advantages.py, failed episodes and segments in the baseline in test_credit.py, and weights counted twice in
test_objectives.py. A table of all, with the threads they were told in, is in tests/test_peers_mistakes.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rehearsal.algorithms import (
    Aggregation,
    EntropyBonus,
    ImportanceCorrection,
    PolicyLoss,
    StepTotals,
    ValueLoss,
    advantages,
    has_variance,
    preset,
    token_weights,
)
from rehearsal.algorithms.presets import PRESETS


def reduced(objective, batch, output):
    result = objective(batch, output)
    totals = StepTotals.count(result.mask_N, batch.sequence_N, batch.n_sequences)
    weights_N = token_weights(objective.aggregation, result.mask_N, batch.sequence_N, totals)
    return objective.coefficient * (result.loss_N * weights_N).sum()


def test_stale_samples_are_not_hidden_by_recomputed_log_probabilities(make_batch):
    """Old log-probabilities recomputed with the present policy make every ratio 1 and hide staleness."""
    batch, output = make_batch(spread=0.8)
    batch.old_logprobs_N = torch.where(batch.policy_mask_N, output.logprobs_N.detach(), torch.nan)
    stale = PolicyLoss(correction=ImportanceCorrection("token_truncate"))(batch, output)
    mask_N = batch.policy_mask_N
    assert (stale.metrics_N["ratio"][mask_N] == 1).all()
    assert (stale.metrics_N["correction"][mask_N] != 1).any()
    unaware = PolicyLoss(correction=ImportanceCorrection("none"))(batch, output)
    assert not torch.allclose(stale.loss_N, unaware.loss_N)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_corrects_for_staleness(name):
    assert preset(name).objectives[0].correction.mode != "none"


def test_a_missing_log_probability_is_an_error_and_no_ratio_of_one(make_batch):
    """TRL takes the weight of a token without a sampling log-probability to be 1."""
    batch, _ = make_batch((4,))
    batch.rollout_logprobs_N[0] = torch.nan
    with pytest.raises(ValueError, match="rollout_logprobs_N"):
        batch.check()


def test_truncated_sequences_count_in_no_denominator(make_batch):
    """Tokens of truncated episodes were taken out of the sum and left in the count."""
    batch, _ = make_batch((6, 6, 6), excluded=(1,))
    totals = StepTotals.count(PolicyLoss().mask(batch), batch.sequence_N, 3)
    assert (totals.n_tokens, totals.n_sequences) == (8, 2)


def test_an_observation_never_counts_as_a_token(make_batch):
    """A denominator over all tokens of a response shrinks the loss of agents with long observations."""
    batch, output = make_batch((6, 6))
    for kind in ("token_mean", "sequence_mean", "constant"):
        objective = PolicyLoss(aggregation=Aggregation(kind))
        loss = reduced(objective, batch, output)
        kept_N = torch.nonzero(batch.policy_mask_N).squeeze(1)
        names = [f.name for f in dataclasses.fields(batch) if f.name.endswith("_N")]
        without = dataclasses.replace(batch, **{name: getattr(batch, name)[kept_N] for name in names})
        said = dataclasses.replace(output, logprobs_N=output.logprobs_N[kept_N])
        assert reduced(objective, without, said).item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_filter_on_the_policy_leaves_the_critic_its_tokens(make_batch):
    """A filter on zero advantages also dropped what other objectives would have learned from."""
    batch, output = make_batch((5, 4, 6))
    before = reduced(ValueLoss(), batch, output)
    filtered = dataclasses.replace(batch, policy_mask_N=torch.zeros_like(batch.policy_mask_N))
    assert reduced(ValueLoss(), filtered, output) == before
    assert reduced(PolicyLoss(), filtered, output) == 0
    assert reduced(EntropyBonus(), filtered, output) == 0


def test_a_filtered_step_has_a_gradient_of_zero_and_not_nan(make_batch):
    batch, output = make_batch(excluded=(0, 1, 2, 3))
    for kind in ("token_mean", "sequence_mean", "constant"):
        loss = reduced(PolicyLoss(aggregation=Aggregation(kind), importance="sequence"), batch, output)
        (gradient_N,) = torch.autograd.grad(loss, output.logprobs_N)
        assert not gradient_N.any()


def test_a_group_of_one_is_not_trained_on_its_raw_reward():
    """verl takes mean 0 and deviation 1 for a group of one, so its advantage is the reward."""
    for estimator in (advantages.grpo, advantages.dr_grpo, advantages.rloo):
        assert estimator([[5.0]]).item() == 0


def test_small_rewards_are_not_taken_for_no_variance():
    """RAGEN's filter drops a whole step when its deviations sum up to less than 0.01."""
    rewards_PG = np.array([[0.0, 1e-4], [2e-4, 1e-4]])
    assert has_variance(rewards_PG).all()


def test_rounding_does_not_make_variance_out_of_equal_rewards():
    """The mean of equal numbers can differ in the last bit, and a small eps would blow that up."""
    rewards_PG = np.full((1, 7), 0.1)
    assert (rewards_PG.mean() - 0.1) != 0  # what a plain implementation would divide by nearly nothing
    assert not advantages.grpo(rewards_PG, eps=0.0).any()
    assert not has_variance(rewards_PG).any()


def test_coefficients_of_one_objective_do_not_dilute_another(make_batch):
    """Each objective has its own mask and count: taking tokens from the policy does not change the critic's weight."""
    batch, output = make_batch((5, 4, 6))
    critic = reduced(ValueLoss(), batch, output)
    fewer = dataclasses.replace(batch, policy_mask_N=batch.policy_mask_N & (batch.sequence_N == 0))
    both = reduced(PolicyLoss(), fewer, output) + reduced(ValueLoss(), fewer, output)
    torch.testing.assert_close(both - reduced(PolicyLoss(), fewer, output), critic)


def test_a_token_that_became_impossible_does_not_blow_up_the_step(make_batch):
    """A single exploding ratio used to be enough to end a run."""
    batch, output = make_batch((4,))
    batch.old_logprobs_N[0] = -2000.0
    batch.rollout_logprobs_N[0] = -2000.0
    for name in sorted(PRESETS):
        objective = preset(name).objectives[0]
        for sign in (1.0, -1.0):
            batch.advantages_N = torch.where(batch.policy_mask_N, sign, 0.0).double()
            loss = reduced(objective, batch, output)
            (gradient_N,) = torch.autograd.grad(loss, output.logprobs_N)
            assert loss.isfinite()
            assert gradient_N.isfinite().all()
