"""How per-token losses become one number: weights that sum a step up to the mean it should be.

A mean taken inside a micro-batch is the best-known bug of the field: micro-batches with few tokens then weigh as much
as long ones, and the gradient depends on how the step was cut. Here nothing is averaged. Each token gets a weight that
is worked out from counts over the whole optimiser step, and the step's loss is the plain sum of ``loss * weight``. A
step cut into micro-batches, in any way that keeps sequences whole or not, has the same loss and the same gradient as
the step in one piece.

Three means are in use, named after what they average:

=================  ==============================================  ==================================================
kind               weight of a token                               source
=================  ==============================================  ==================================================
``token_mean``     1 / (tokens of the step)                        DAPO, arXiv:2503.14476, eq. 8
``sequence_mean``  1 / (sequences of the step * tokens of its      GRPO, arXiv:2402.03300, eq. 3
                   own sequence)
``constant``       1 / (sequences of the step * constant)          Dr. GRPO, arXiv:2503.20783, eq. 2
=================  ==============================================  ==================================================

"Tokens" are the tokens that the objective's mask selects; a "sequence" is one segment of a trajectory.

A sequence of which the mask selects nothing (a failed episode, one taken out by a filter, one that was cut off) does
not count as a sequence. Otherwise taking out half of the sequences would halve the step for the other half, and the
strength of a filter would be a hidden learning rate. TRL counts such sequences in ``grpo`` and ``dr_grpo`` (it divides
by the rows of the batch); the two agree wherever every row has a token to learn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rehearsal.errors import RecipeError

AggregationKind = Literal["token_mean", "sequence_mean", "constant"]
AGGREGATIONS: tuple[str, ...] = get_args(AggregationKind)
"""The names that :class:`Aggregation` knows."""


@dataclass(frozen=True)
class Aggregation:
    """Which mean an objective's per-token losses are reduced to.

    Attributes:
        kind: one of :data:`AGGREGATIONS`.
        constant: for ``constant``, the number of tokens that every sequence is divided by, whatever its length. It
            only scales the gradient: the usual choice is the most tokens that a sequence may have.

    Raises:
        RecipeError: for an unknown kind or a constant that is not positive.
    """

    kind: AggregationKind = "token_mean"
    constant: float = 512.0

    def __post_init__(self) -> None:
        if self.kind not in AGGREGATIONS:
            raise RecipeError(f"there is no aggregation {self.kind!r}: choose one of {', '.join(AGGREGATIONS)}")
        if not self.constant > 0:
            raise RecipeError(f"the constant of an aggregation must be positive, not {self.constant}")

    def __str__(self) -> str:
        return f"constant ({self.constant:g} tokens)" if self.kind == "constant" else self.kind.replace("_", " ")


@dataclass(frozen=True)
class StepTotals:
    """What one objective's mask selects over a whole optimiser step.

    A learner on several processes adds ``n_tokens`` and ``n_sequences`` up over them; ``tokens_per_sequence`` stays
    local.

    Attributes:
        n_tokens: tokens that the mask selects.
        n_sequences: sequences with at least one such token.
        tokens_per_sequence: int64 of shape (S,), such tokens in each sequence.
    """

    n_tokens: int
    n_sequences: int
    tokens_per_sequence: Tensor

    @classmethod
    def count(cls, mask_N: Tensor, sequence_N: Tensor, n_sequences: int) -> StepTotals:
        """Count a mask over the tokens of a whole step.

        Args:
            mask_N: bool of shape (N,).
            sequence_N: int64 of shape (N,), values in 0..n_sequences-1.
            n_sequences: S, sequences in the step, those without a selected token included.
        """
        tokens_S = torch.bincount(sequence_N[mask_N], minlength=n_sequences)
        return cls(n_tokens=int(tokens_S.sum()), n_sequences=int((tokens_S > 0).sum()), tokens_per_sequence=tokens_S)

    def select(self, sequences: Tensor) -> StepTotals:
        """The same step's totals for a micro-batch that holds the sequences ``sequences`` (int64) of the step.

        The counts over the step stay as they are; only ``tokens_per_sequence`` is renumbered.
        """
        return StepTotals(self.n_tokens, self.n_sequences, self.tokens_per_sequence[sequences])


def token_weights(aggregation: Aggregation, mask_N: Tensor, sequence_N: Tensor, totals: StepTotals) -> Tensor:
    """The weight of each token in the step's loss.

    Args:
        aggregation: which mean.
        mask_N: bool of shape (N,), the tokens of this micro-batch that the objective's mask selects.
        sequence_N: int64 of shape (N,), index of each token's sequence into ``totals.tokens_per_sequence``.
        totals: counts over the whole step, see :meth:`StepTotals.count` and :meth:`StepTotals.select`.

    Returns:
        float32 of shape (N,), zero outside the mask. Summed over the tokens of the step they give 1 for
        ``token_mean`` and ``sequence_mean``. All zero where the step selects nothing.
    """
    if totals.n_tokens == 0:
        return torch.zeros(mask_N.shape, dtype=torch.float32, device=mask_N.device)
    if aggregation.kind == "token_mean":
        denominators_N = torch.full(mask_N.shape, float(totals.n_tokens), dtype=torch.float64, device=mask_N.device)
    elif aggregation.kind == "sequence_mean":
        tokens_N = totals.tokens_per_sequence.to(mask_N.device)[sequence_N]
        # The clamp touches only tokens outside the mask: a selected token's sequence has at least that token.
        denominators_N = tokens_N.clamp(min=1).double() * totals.n_sequences
    else:
        per_sequence = totals.n_sequences * aggregation.constant
        denominators_N = torch.full(mask_N.shape, per_sequence, dtype=torch.float64, device=mask_N.device)
    return (mask_N / denominators_N).float()
