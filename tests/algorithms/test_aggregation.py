"""The weights sum a step up to the right mean, however the step is cut."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.algorithms import (
    AGGREGATIONS,
    Aggregation,
    CISPOLoss,
    EntropyBonus,
    KLLoss,
    PolicyLoss,
    PolicyOutput,
    StepTotals,
    ValueLoss,
    token_weights,
)
from rehearsal.errors import RecipeError

MASK_N = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
SEQUENCE_N = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3])


def worked_weights(aggregation):
    totals = StepTotals.count(MASK_N, SEQUENCE_N, 4)
    return token_weights(aggregation, MASK_N, SEQUENCE_N, totals)


def test_counts_leave_out_sequences_without_a_selected_token():
    totals = StepTotals.count(MASK_N, SEQUENCE_N, 5)  # sequence 2 has no selected token, sequence 4 no token at all
    assert (totals.n_tokens, totals.n_sequences) == (6, 3)
    assert totals.tokens_per_sequence.tolist() == [2, 1, 0, 3, 0]


def test_token_mean_by_hand():
    expected = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1]) / 6
    torch.testing.assert_close(worked_weights(Aggregation("token_mean")), expected)


def test_sequence_mean_by_hand():
    expected = torch.tensor([1 / 6, 1 / 6, 0, 1 / 3, 0, 0, 1 / 9, 1 / 9, 1 / 9])
    torch.testing.assert_close(worked_weights(Aggregation("sequence_mean")), expected)


def test_constant_by_hand():
    expected = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1]) / (3 * 10)
    torch.testing.assert_close(worked_weights(Aggregation("constant", 10.0)), expected)


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_a_step_that_selects_nothing_has_weights_of_zero(kind):
    nothing = torch.zeros_like(MASK_N)
    weights_N = token_weights(Aggregation(kind), nothing, SEQUENCE_N, StepTotals.count(nothing, SEQUENCE_N, 4))
    assert weights_N.tolist() == [0.0] * 9


def all_objectives(aggregation):
    return [
        PolicyLoss(aggregation=aggregation, dual_clip=3.0),
        PolicyLoss(aggregation=aggregation, importance="sequence"),
        CISPOLoss(aggregation=aggregation),
        KLLoss(aggregation=aggregation),
        EntropyBonus(aggregation=aggregation),
        ValueLoss(aggregation=aggregation),
    ]


def step_gradient(objective, batch, output, cuts):
    """The gradient of the step's loss with respect to everything the model says, the step cut into micro-batches."""
    leaves = [output.logprobs_N, output.entropy_N, output.values_N]
    for leaf in leaves:
        leaf.grad = None
    totals = StepTotals.count(objective.mask(batch), batch.sequence_N, batch.n_sequences)
    loss = 0.0
    for cut in cuts:
        index_N = batch.token_index(cut)
        micro = batch.select(index_N)
        said = PolicyOutput(*(leaf[index_N] for leaf in leaves))
        result = objective(micro, said)
        assert torch.equal(result.mask_N, objective.mask(batch)[index_N])
        weights_N = token_weights(
            objective.aggregation, result.mask_N, micro.sequence_N, totals.select(micro.step_sequences_S)
        )
        part = (result.loss_N * weights_N.double()).sum()
        part.backward()
        loss += part.item()
    return loss, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]


CUTS = [
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[i] for i in range(8)],
    [[7, 0], [3, 5, 1], [2], [4, 6]],
    [[5, 4, 3, 2, 1, 0], [6, 7]],
]


@pytest.mark.parametrize("kind", AGGREGATIONS)
@pytest.mark.parametrize("which", range(6))
def test_one_batch_of_eight_equals_eight_batches_of_one(make_batch, kind, which):
    objective = all_objectives(Aggregation(kind))[which]
    batch, output = make_batch((5, 1, 7, 3, 2, 12, 4, 6), excluded=(3,))
    whole_loss, whole = step_gradient(objective, batch, output, CUTS[0])
    assert whole_loss != 0
    for cuts in CUTS[1:]:
        loss, gradients = step_gradient(objective, batch, output, cuts)
        assert loss == pytest.approx(whole_loss, abs=1e-12)
        for got, expected in zip(gradients, whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_a_mean_of_micro_batch_means_would_be_seen(make_batch):
    """The control of the test above: the bug it is there for changes the loss by far more than its tolerance."""
    batch, output = make_batch((5, 1, 7, 3, 2, 12, 4, 6))
    objective = PolicyLoss()
    right, _ = step_gradient(objective, batch, output, CUTS[1])
    means = []
    for cut in CUTS[1]:
        index_N = batch.token_index(cut)
        result = objective(batch.select(index_N), PolicyOutput(output.logprobs_N[index_N]))
        means.append(result.loss_N[result.mask_N].mean().item())
    assert abs(sum(means) / len(means) - right) > 1e-3


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_sequences_taken_out_do_not_shrink_the_step(make_batch, kind):
    """Masked and truncated sequences count in no denominator: the step is the one without them."""
    objective = PolicyLoss(aggregation=Aggregation(kind))
    batch, output = make_batch((5, 4, 7, 3), excluded=(1, 3))
    with_them, gradients = step_gradient(objective, batch, output, [[0, 1, 2, 3]])
    kept_N = batch.token_index([0, 2])
    kept = dataclasses.replace(batch.select(kept_N), step_sequences_S=None)
    alone = PolicyOutput(*(leaf.detach()[kept_N].requires_grad_() for leaf in dataclasses.astuple(output)))
    without, expected = step_gradient(objective, kept, alone, [[0, 1]])
    assert with_them == pytest.approx(without, abs=1e-12)
    torch.testing.assert_close(gradients[0][kept_N], expected[0])


@pytest.mark.parametrize("kind", AGGREGATIONS)
def test_copying_every_sequence_leaves_the_loss_as_it_is(make_batch, kind):
    """The loss is a mean over samples: the number of samples of a prompt is no hidden factor."""
    objective = PolicyLoss(aggregation=Aggregation(kind))
    batch, output = make_batch((5, 4, 7), excluded=(1,))
    once, _ = step_gradient(objective, batch, output, [[0, 1, 2]])
    doubled_N = batch.token_index([0, 1, 2, 0, 1, 2])
    double = dataclasses.replace(batch.select(doubled_N), step_sequences_S=None)
    said = PolicyOutput(*(leaf.detach()[doubled_N].requires_grad_() for leaf in dataclasses.astuple(output)))
    twice, _ = step_gradient(objective, double, said, [[0, 1, 2], [3, 4, 5]])
    assert twice == pytest.approx(once, abs=1e-12)


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=8),
    st.sampled_from(["token_mean", "sequence_mean"]),
)
def test_weights_of_a_mean_sum_to_one(masks, kind):
    mask_N = torch.tensor(list(itertools.chain.from_iterable(masks)))
    sequence_N = torch.repeat_interleave(torch.arange(len(masks)), torch.tensor([len(m) for m in masks]))
    totals = StepTotals.count(mask_N, sequence_N, len(masks))
    weights_N = token_weights(Aggregation(kind), mask_N, sequence_N, totals)
    assert float(weights_N.sum()) == pytest.approx(float(mask_N.any()), abs=1e-6)
    assert not weights_N[~mask_N].any()


@pytest.mark.parametrize("arguments", [("mean",), ("constant", 0.0), ("constant", -1.0), ("constant", float("nan"))])
def test_bad_aggregations_are_refused(arguments):
    with pytest.raises(RecipeError):
        Aggregation(*arguments)
