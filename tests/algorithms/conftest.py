"""Builders of small batches for the tests of objectives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rehearsal.algorithms import PolicyOutput, TokenBatch
from rehearsal.trajectory import Kind

BatchMaker = Callable[..., tuple[TokenBatch, PolicyOutput]]


def random_batch(
    lengths: tuple[int, ...] = (5, 1, 7, 3),
    *,
    seed: int = 0,
    spread: float = 0.3,
    bypass: bool = False,
    dtype: torch.dtype = torch.float64,
    excluded: tuple[int, ...] = (),
) -> tuple[TokenBatch, PolicyOutput]:
    """Sequences of the given lengths in which every third token is an observation, with everything filled in.

    ``spread`` is how far the four policies are apart, in nats; ``excluded`` sequences are out of the policy's mask.
    """
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def noise(scale: float) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) * scale

    sequence_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    sampled_N = positions_N % 3 != 1
    logprobs_N = -1.5 + noise(0.3)
    old_N = torch.where(sampled_N, logprobs_N + noise(spread), torch.nan)
    rollout_N = old_N.clone() if bypass else torch.where(sampled_N, old_N + noise(spread), torch.nan)
    values_N = noise(1.0)
    per_sequence_S = torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype)
    batch = TokenBatch(
        token_ids_N=torch.arange(n),
        kinds_N=torch.where(sampled_N, int(Kind.ACTION), int(Kind.OBSERVATION)).to(torch.int8),
        turns_N=positions_N // 3,
        sequence_N=sequence_N,
        n_sequences=len(lengths),
        advantages_N=torch.where(sampled_N, per_sequence_S[sequence_N], 0.0),
        policy_mask_N=sampled_N & ~torch.isin(sequence_N, torch.tensor(excluded, dtype=torch.int64)),
        rollout_logprobs_N=rollout_N,
        old_logprobs_N=old_N,
        reference_logprobs_N=torch.where(sampled_N, logprobs_N + noise(spread), torch.nan),
        old_values_N=values_N + noise(0.5),
        returns_N=torch.where(sampled_N, noise(1.0), torch.nan),
        observation_mask_N=~sampled_N,
    )
    output = PolicyOutput(
        logprobs_N=logprobs_N.clone().requires_grad_(),
        entropy_N=(1.0 + noise(0.1)).requires_grad_(),
        values_N=values_N.clone().requires_grad_(),
    )
    return batch, output


@pytest.fixture
def make_batch() -> BatchMaker:
    return random_batch
