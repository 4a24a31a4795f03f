"""The observation loss: the next-token loss of the environment's words, and of nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rehearsal.algorithms import Aggregation, StepTotals, token_weights
from rehearsal.algorithms.observation import HoldLoss, ObservationLoss
from rehearsal.trajectory import SAMPLED_KINDS


def test_it_is_the_mean_nll_of_answers(make_batch):
    batch, output = make_batch((5, 1, 7))
    objective = ObservationLoss()
    result = objective(batch, output)
    told_N = batch.observation_mask_N
    assert torch.equal(result.mask_N, told_N)
    assert (result.loss_N[~told_N] == 0).all()
    totals = StepTotals.count(objective.mask(batch), batch.sequence_N, batch.n_sequences)
    weights_N = token_weights(objective.aggregation, result.mask_N, batch.sequence_N, totals)
    loss = (result.loss_N * weights_N).sum()
    assert loss.item() == pytest.approx(-output.logprobs_N[told_N].mean().item())
    (gradient_N,) = torch.autograd.grad(loss, output.logprobs_N)
    assert (gradient_N[~told_N] == 0).all()
    assert torch.allclose(gradient_N[told_N], torch.full((), -1 / int(told_N.sum()), dtype=torch.float64))


def test_rewards_and_filters_do_not_matter(make_batch):
    batch, output = make_batch((5, 7))
    other = dataclasses.replace(
        batch,
        advantages_N=torch.zeros_like(batch.advantages_N),
        policy_mask_N=torch.zeros_like(batch.policy_mask_N),
        old_logprobs_N=torch.full_like(batch.old_logprobs_N, torch.nan),
    )
    objective = ObservationLoss(aggregation=Aggregation("sequence_mean"))
    assert torch.equal(objective(batch, output).loss_N, objective(other, output).loss_N)


def test_its_figures(make_batch):
    batch, output = make_batch((5, 7))
    told_N = batch.observation_mask_N
    metrics = ObservationLoss()(batch, output).metrics_N
    assert torch.allclose(metrics["prediction_loss"][told_N], -output.logprobs_N.detach()[told_N])
    likely_N = output.logprobs_N.detach().exp() > 0.5
    assert torch.equal(metrics["top_probability"][told_N] > 0, likely_N[told_N])


def test_a_batch_without_answers_marked_is_a_mistake(make_batch):
    batch, output = make_batch((5,))
    with pytest.raises(ValueError, match="needs observation_mask_N"):
        ObservationLoss()(dataclasses.replace(batch, observation_mask_N=None), output)


def test_words_are_held_that_have_become_less_likely_and_no_others(make_batch):
    batch, output = make_batch((5, 1, 7))
    sampled_N = torch.isin(batch.kinds_N.long(), torch.tensor(SAMPLED_KINDS))
    result = HoldLoss()(batch, output)
    assert torch.equal(result.mask_N, sampled_N)
    lost_N = (batch.old_logprobs_N - output.logprobs_N).clamp(min=0)[sampled_N]
    assert 0 < int((lost_N > 0).sum()) < len(lost_N), "the batch has both"
    assert torch.allclose(result.loss_N[sampled_N], lost_N)
    assert (result.loss_N[~sampled_N] == 0).all()
    (gradient_N,) = torch.autograd.grad(result.loss_N.sum(), output.logprobs_N)
    assert torch.equal(gradient_N != 0, sampled_N & (result.loss_N > 0))
    assert torch.equal(result.metrics_N["lost"][sampled_N], result.loss_N.detach()[sampled_N])
    assert torch.equal(result.metrics_N["less_likely"][sampled_N] > 0, lost_N.detach() > 0)
