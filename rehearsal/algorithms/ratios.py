"""Probability ratios between three policies: the one that sampled, the one at the start of the step, the one of now.

``rollout`` sampled the tokens, ``old`` is the policy at the start of the optimiser step, and the present one has the
gradient. The objective's ratio is present / old; the correction below is old / rollout. With ``old = rollout``
("bypass") the objective's ratio already holds the whole difference and the correction is exactly 1, so it is never
counted twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rehearsal.algorithms.batch import TokenBatch
from rehearsal.errors import RecipeError

LOG_RATIO_LIMIT = 20.0
"""Differences of log-probabilities are cut to plus or minus this, so that no ratio overflows (verl does the same)."""


def log_ratio(upper_N: Tensor, lower_N: Tensor, mask_N: Tensor) -> Tensor:
    """upper - lower inside the mask, cut to plus or minus :data:`LOG_RATIO_LIMIT`; 0 outside.

    Both are replaced outside the mask before they meet: a NaN there (the log-probability of a token that was not
    sampled) would otherwise come back as a NaN gradient, through a product with 0.
    """
    zero = upper_N.new_zeros(())
    difference_N = torch.where(mask_N, upper_N, zero) - torch.where(mask_N, lower_N, zero)
    return difference_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_sums(values_N: Tensor, batch: TokenBatch) -> Tensor:
    """The sum over each sequence; shape (S,)."""
    return values_N.new_zeros(batch.n_sequences).index_add(0, batch.sequence_N, values_N)


CorrectionMode = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
CORRECTIONS: tuple[str, ...] = get_args(CorrectionMode)
"""The modes that :class:`ImportanceCorrection` knows."""


@dataclass(frozen=True)
class ImportanceCorrection:
    """Weights that make up for having sampled from another policy than the one at the start of the step.

    The engine that samples and the model that learns are not the same program, and an asynchronous rollout is some
    steps old; w = old / rollout corrects for either. The modes are TRL's: ``token_*`` takes the ratio of each token,
    ``sequence_*`` the product of the ratios of a sequence's tokens; ``*_truncate`` cuts w to low..high (truncated
    importance sampling), ``*_mask`` drops what lies outside (w = 0; it still counts in the mean, so a step that is
    mostly dropped is a small step). The weights have no gradient.

    Attributes:
        mode: one of :data:`CORRECTIONS`.
        low: the smallest weight, at most 1.
        high: the largest, at least 1. Usual are 1.5 to 5 for tokens and 2 to 10 for sequences.

    Raises:
        RecipeError: for an unknown mode, or bounds that leave 1 out (they would change a step that is on-policy).
    """

    mode: CorrectionMode = "token_truncate"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        if self.mode not in CORRECTIONS:
            raise RecipeError(f"there is no correction {self.mode!r}: choose one of {', '.join(CORRECTIONS)}")
        if not 0 <= self.low <= 1 <= self.high:
            raise RecipeError(
                f"the bounds of a correction must satisfy 0 <= low <= 1 <= high, not {self.low} and {self.high}"
            )

    def weights(self, batch: TokenBatch, mask_N: Tensor) -> Tensor:
        """The weight of each token; exactly 1 outside the mask and wherever old and rollout are the same."""
        difference_N = log_ratio(batch.old_logprobs_N, batch.rollout_logprobs_N, mask_N).detach()
        if self.mode == "none":
            return torch.ones_like(difference_N)
        if self.mode.startswith("sequence"):
            totals_S = sequence_sums(difference_N, batch).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            difference_N = torch.where(mask_N, totals_S[batch.sequence_N], 0.0)
        weights_N = difference_N.exp()
        if self.mode.endswith("truncate"):
            return weights_N.clamp(self.low, self.high)
        return torch.where((weights_N < self.low) | (weights_N > self.high), 0.0, weights_N)
