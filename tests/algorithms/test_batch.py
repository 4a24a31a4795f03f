"""Batches keep sequences whole and refuse values that no objective could use."""

from __future__ import annotations

import dataclasses

import pytest
import torch


def test_select_renumbers_and_remembers_where_sequences_came_from(make_batch):
    batch, _ = make_batch((2, 3, 1, 4))
    part = batch.select(batch.token_index([3, 1]))
    assert part.token_ids_N.tolist() == [6, 7, 8, 9, 2, 3, 4]
    assert part.sequence_N.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert (part.n_sequences, part.step_sequences_S.tolist()) == (2, [3, 1])
    again = part.select(part.token_index([1]))
    assert (again.token_ids_N.tolist(), again.step_sequences_S.tolist()) == ([2, 3, 4], [1])


def test_select_takes_every_array_along(make_batch):
    batch, _ = make_batch((2, 3))
    part = batch.select(batch.token_index([1]))
    part.check()
    for field in dataclasses.fields(batch):
        if field.name.endswith("_N") and field.name != "sequence_N":
            expected = getattr(batch, field.name)[2:]
            torch.testing.assert_close(getattr(part, field.name), expected, equal_nan=True)


@pytest.mark.parametrize("index", [[0], [0, 1, 2], [1, 0], [0, 2, 3, 4, 1], [2, 4, 3]])
def test_select_refuses_pieces_of_sequences(make_batch, index):
    batch, _ = make_batch((2, 3))
    with pytest.raises(ValueError, match="whole sequences"):
        batch.select(torch.tensor(index))


def test_sequences_without_tokens_keep_their_place(make_batch):
    """An episode may end before anything was sampled; dropping it would shift the numbers of all that follow."""
    batch, _ = make_batch((2, 0, 3, 0))
    part = batch.select_sequences([1, 2, 3, 0])
    assert part.sequence_N.tolist() == [1, 1, 1, 3, 3]
    assert part.token_ids_N.tolist() == [2, 3, 4, 0, 1]
    assert (part.n_sequences, part.step_sequences_S.tolist()) == (4, [1, 2, 3, 0])
    part.check()
    again = part.select_sequences([3, 0])
    assert (again.sequence_N.tolist(), again.step_sequences_S.tolist()) == ([0, 0], [0, 1])


def test_select_of_nothing_is_an_empty_batch(make_batch):
    batch, _ = make_batch((2, 3))
    part = batch.select(batch.token_index([]))
    assert (len(part), part.n_sequences) == (0, 0)


def test_arrays_of_different_length_are_refused(make_batch):
    batch, _ = make_batch((2, 3))
    with pytest.raises(ValueError, match="one length"):
        dataclasses.replace(batch, advantages_N=torch.zeros(4))


def test_a_good_batch_passes_the_check(make_batch):
    make_batch()[0].check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rollout_logprobs_N", torch.nan),
        ("old_logprobs_N", torch.nan),
        ("reference_logprobs_N", torch.nan),
        ("old_values_N", torch.nan),
        ("advantages_N", torch.nan),
        ("advantages_N", torch.inf),
        ("sequence_N", 9),
    ],
)
def test_check_names_what_is_unusable(make_batch, name, value):
    batch, _ = make_batch((3, 3))
    getattr(batch, name)[2] = value
    with pytest.raises(ValueError, match=name):
        batch.check()


def test_check_refuses_a_policy_mask_on_observations(make_batch):
    batch, _ = make_batch((3,))
    batch.policy_mask_N[1] = True
    with pytest.raises(ValueError, match="did not sample"):
        batch.check()
