"""What passes between the learner and the objectives, flat over tokens.

The learner concatenates the target tokens of its sequences (a sequence is one segment of a trajectory) and every array
here has one entry a token: no padding, no row that has to be masked out again. ``N`` counts tokens, ``S`` sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rehearsal.algorithms.aggregation import Aggregation
from rehearsal.trajectory import SAMPLED_KINDS


@dataclass
class TokenBatch:
    """The target tokens of an optimiser step, or of one micro-batch of it, and what is known about them beforehand.

    Nothing here carries a gradient. "Sampled from" means the distribution with its temperature and truncation; the
    learner has to compute :class:`PolicyOutput` under the same temperature, or every ratio is off.

    Attributes:
        token_ids_N: int64, the tokens.
        kinds_N: int8, values of :class:`rehearsal.trajectory.Kind`.
        turns_N: int64, the turn of the episode that each token belongs to.
        sequence_N: int64 in 0..S-1, never decreasing: sequences lie one after the other.
        n_sequences: S.
        advantages_N: float32, finite everywhere; 0 where there is none.
        policy_mask_N: bool, the tokens that the policy learns from: sampled ones, of sequences that no filter and no
            failure has taken out.
        rollout_logprobs_N: float32, log-probability under the policy that sampled the token; NaN where not sampled.
        old_logprobs_N: float32, log-probability under the policy at the start of the step, which ratios are taken to.
            Either recomputed, or the same as ``rollout_logprobs_N`` ("bypass"); NaN where not sampled.
        reference_logprobs_N: float32, log-probability under a frozen reference, or None.
        old_values_N: float32, the critic's values at the start of the step, or None. The value of a token is the value
            of the state before it was sampled.
        returns_N: float32, what the critic should have said; NaN where a token has no return. None without a critic.
        observation_mask_N: bool, the tokens that a world model learns from; None where nobody does.
        truncated: whether ``rollout_logprobs_N`` are over a part of the vocabulary (top-p, top-k); the learner's
            log-probs, which are over all of it, cannot be compared with them then.
        step_sequences_S: int64, where each sequence stands in the step's batch, for
            :meth:`rehearsal.algorithms.aggregation.StepTotals.select`. Left out, it is 0..S-1.

    Raises:
        ValueError: when the arrays differ in length or sequences do not lie in order.
    """

    token_ids_N: Tensor
    kinds_N: Tensor
    turns_N: Tensor
    sequence_N: Tensor
    n_sequences: int
    advantages_N: Tensor
    policy_mask_N: Tensor
    rollout_logprobs_N: Tensor
    old_logprobs_N: Tensor
    reference_logprobs_N: Tensor | None = None
    old_values_N: Tensor | None = None
    returns_N: Tensor | None = None
    observation_mask_N: Tensor | None = None
    truncated: bool = False
    step_sequences_S: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(array_N.shape) for name, array_N in self._token_arrays().items()}
        if len(set(shapes.values())) != 1 or len(shapes["token_ids_N"]) != 1:
            raise ValueError(f"the token arrays of a batch must be flat and of one length: {shapes}")
        if self.step_sequences_S is None:
            self.step_sequences_S = torch.arange(self.n_sequences, device=self.sequence_N.device)
        if len(self.step_sequences_S) != self.n_sequences:
            raise ValueError(f"step_sequences_S has {len(self.step_sequences_S)} entries, not {self.n_sequences}")

    def __len__(self) -> int:
        return len(self.token_ids_N)

    def _token_arrays(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_N")}
        return {name: value for name, value in values.items() if value is not None}

    def check(self) -> None:
        """Look at the values; for the learner, once a step (it waits for the device).

        Raises:
            ValueError: naming the first array with a value that no objective could use. It is a mistake of whoever
                filled the batch: a log-probability that is missing for a sampled token is never taken for a ratio of 1.
        """
        if len(self) and (int(self.sequence_N.min()) < 0 or int(self.sequence_N.max()) >= self.n_sequences):
            raise ValueError(f"sequence_N must lie in 0..{self.n_sequences - 1}")
        if bool((self.sequence_N.diff() < 0).any()):
            raise ValueError("sequence_N must never decrease: the tokens of a sequence lie together")
        if not bool(self.advantages_N.isfinite().all()):
            raise ValueError("advantages_N must be finite")
        sampled_N = torch.isin(self.kinds_N.long(), torch.tensor(SAMPLED_KINDS, device=self.kinds_N.device))
        if bool((self.policy_mask_N & ~sampled_N).any()):
            raise ValueError("policy_mask_N selects tokens that the policy did not sample")
        wanted: list[tuple[str, Tensor | None, Tensor]] = [
            ("rollout_logprobs_N", self.rollout_logprobs_N, self.policy_mask_N),
            ("old_logprobs_N", self.old_logprobs_N, self.policy_mask_N),
            ("reference_logprobs_N", self.reference_logprobs_N, self.policy_mask_N),
        ]
        if self.returns_N is not None:
            wanted.append(("old_values_N", self.old_values_N, ~self.returns_N.isnan()))
        for name, array_N, where_N in wanted:
            if array_N is not None and bool((array_N.isnan() & where_N).any()):
                raise ValueError(f"{name} is NaN for a token that an objective learns from")

    def token_index(self, sequences: Sequence[int] | Tensor) -> Tensor:
        """int64, the tokens of the given sequences, in the order in which the sequences are given."""
        numbers = torch.as_tensor(sequences, dtype=torch.int64, device=self.sequence_N.device)
        lengths_S = torch.bincount(self.sequence_N, minlength=self.n_sequences)
        starts_S = lengths_S.cumsum(0) - lengths_S
        pieces = [torch.arange(int(starts_S[s]), int(starts_S[s] + lengths_S[s])) for s in numbers.tolist()]
        return torch.cat(pieces).to(self.sequence_N.device) if pieces else numbers

    def select(self, index_N: Tensor) -> TokenBatch:
        """A micro-batch: the tokens ``index_N`` (int64), which must be whole sequences, renumbered from 0 on.

        A sequence without target tokens cannot be named by its tokens, so it has no number in the result: where a
        step may hold one, use :meth:`select_sequences`.

        Raises:
            ValueError: when a sequence is cut or taken apart. A mean over a sequence (and the ratio of a sequence)
                would silently become one over a piece of it.
        """
        numbers = torch.unique_consecutive(self.sequence_N[index_N])
        if not torch.equal(self.token_index(numbers), index_N):
            raise ValueError("a micro-batch must hold whole sequences, their tokens in order")
        return self.select_sequences(numbers)

    def select_sequences(self, sequences: Sequence[int] | Tensor) -> TokenBatch:
        """A micro-batch of these sequences: the one at position i becomes sequence i, also if it has no token."""
        numbers = torch.as_tensor(sequences, dtype=torch.int64, device=self.sequence_N.device)
        index_N = self.token_index(numbers)
        lengths_S = torch.bincount(self.sequence_N, minlength=self.n_sequences)[numbers]
        assert self.step_sequences_S is not None  # set in __post_init__
        changes: dict[str, Any] = {name: array_N[index_N] for name, array_N in self._token_arrays().items()}
        changes["sequence_N"] = torch.repeat_interleave(torch.arange(len(numbers), device=numbers.device), lengths_S)
        changes["step_sequences_S"] = self.step_sequences_S[numbers]
        return replace(self, n_sequences=len(numbers), **changes)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {name: array_N.to(device) for name, array_N in self._token_arrays().items()}
        assert self.step_sequences_S is not None  # set in __post_init__
        moved["step_sequences_S"] = self.step_sequences_S.to(device)
        return replace(self, **moved)


@dataclass
class PolicyOutput:
    """What the model says now about the tokens of a batch, with gradient.

    Attributes:
        logprobs_N: log-probability of each target token, finite for the tokens that an objective learns from.
        entropy_N: entropy in nats of the distribution that each token is drawn from, or None.
        values_N: the critic's value of the state before each token, or None.
    """

    logprobs_N: Tensor
    entropy_N: Tensor | None = None
    values_N: Tensor | None = None


@dataclass
class TokenLoss:
    """What an objective says about a batch. The learner reduces it, nobody else.

    Attributes:
        loss_N: loss of each token, with gradient; 0 outside the mask, so a weight of 0 never meets a NaN.
        mask_N: bool, the tokens that count. It is the same before and after an update of the parameters.
        metrics_N: figures of each token without gradient, by name, for the learner to average over the mask.
    """

    loss_N: Tensor
    mask_N: Tensor
    metrics_N: dict[str, Tensor]


class Objective(Protocol):
    """One term of the loss, with its own mask, its own counts and its own parameters to update.

    The learner adds up ``coefficient * (loss_N * weights_N).sum()`` over objectives and micro-batches, with
    ``weights_N`` from :func:`rehearsal.algorithms.aggregation.token_weights` and totals counted over
    :meth:`mask` of the whole step.
    """

    @property
    def name(self) -> str:
        """Names the objective in metrics and messages."""

    @property
    def parameters(self) -> str:
        """The parameters that its gradient reaches: "all", or the name of an adapter."""

    @property
    def coefficient(self) -> float:
        """What its loss is multiplied by."""

    @property
    def aggregation(self) -> Aggregation:
        """Which mean its per-token losses are reduced to."""

    @property
    def needs_entropy(self) -> bool:
        """Whether it reads ``PolicyOutput.entropy_N``."""

    @property
    def needs_reference(self) -> bool:
        """Whether it reads ``TokenBatch.reference_logprobs_N``."""

    @property
    def needs_values(self) -> bool:
        """Whether it reads ``PolicyOutput.values_N`` and the batch's old values and returns."""

    def mask(self, batch: TokenBatch) -> Tensor:
        """bool of shape (N,): the tokens that count, known before the first backward pass of the step."""

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        """The loss of each token."""
