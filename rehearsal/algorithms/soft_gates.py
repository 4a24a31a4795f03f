"""Objectives of the policy that let go of a token or a sequence step by step, where a clip drops it at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rehearsal.algorithms.batch import PolicyOutput, TokenBatch, TokenLoss
from rehearsal.algorithms.objectives import PolicyObjective, zeroed
from rehearsal.algorithms.ratios import LOG_RATIO_LIMIT, log_ratio, sequence_sums
from rehearsal.errors import RecipeError

_LEAST_LOG = math.log(1e-8)
"""Below this a sequence's weight counts as this (as in the published code)."""


@dataclass(frozen=True)
class SAPOLoss(PolicyObjective):
    """Soft adaptive policy optimisation (arXiv:2511.20347): -4/T sigmoid(T (r - 1)) A, with r = present / old.

    The gradient is that of r A times 4 sigmoid(T (r - 1)) (1 - sigmoid(T (r - 1))): all of it at r = 1, ever less on
    both sides, whatever the sign of A. A higher temperature T lets go sooner; the published one is higher for bad
    episodes, whose gradient spreads over all the tokens that were not sampled. Published with ``sequence_mean``.

    Metrics: ``ratio``; ``gate``, the share of the gradient that is left; ``kl_old``; ``correction``.

    Attributes:
        temperature_positive: T where A > 0.
        temperature_negative: T elsewhere.

    Raises:
        RecipeError: for a temperature that is not positive.
    """

    temperature_positive: float = 1.0
    temperature_negative: float = 1.05

    def __post_init__(self) -> None:
        if not (self.temperature_positive > 0 and self.temperature_negative > 0):
            raise RecipeError(
                "SAPO's temperatures must be positive, and are "
                f"{self.temperature_positive} and {self.temperature_negative}"
            )

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        mask_N = self.mask(batch)
        advantages_N = zeroed(batch.advantages_N, mask_N)
        token_log_N = log_ratio(output.logprobs_N, batch.old_logprobs_N, mask_N)
        ratio_N = token_log_N.exp()
        temperature_N = _either(
            advantages_N > 0, self.temperature_positive, self.temperature_negative, like=advantages_N
        )
        gate_N = torch.sigmoid(temperature_N * (ratio_N - 1))
        correction_N = self.correction.weights(batch, mask_N)
        loss_N = -4 / temperature_N * gate_N * advantages_N * correction_N
        with torch.no_grad():
            metrics_N = {
                "ratio": ratio_N.detach(),
                "gate": (4 * gate_N * (1 - gate_N)).detach(),
                "kl_old": token_log_N.exp() - 1 - token_log_N,
                "correction": correction_N,
            }
        return TokenLoss(zeroed(loss_N, mask_N), mask_N, metrics_N)


@dataclass(frozen=True)
class VESPOLoss(PolicyObjective):
    """Variational sequence-level soft policy optimisation (arXiv:2602.10693): -detach(phi(w)) A log present.

    w is the product of the ratios present / old of a sequence's tokens, and of the correction's weights, so that it
    goes all the way back to what sampled. phi(w) = w^k exp(decay (1 - w)) is 1 at w = 1 and largest at w = k / decay;
    it falls like a power below, where a sequence became unlikely, and exponentially above. The product of many tokens
    moves fast: with long sequences phi is near 0 after a few updates of one batch.

    Metrics: ``ratio`` (of the token); ``gate``, phi; ``kl_old``; ``correction``.

    Attributes:
        power_positive, decay_positive: k and decay where A >= 0.
        power_negative, decay_negative: the same elsewhere.

    Raises:
        RecipeError: for a negative power, a decay that is not positive, or a correction by sequences: their weights are
            the product already, and it would be counted once for each token.
    """

    power_positive: float = 2.0
    decay_positive: float = 3.0
    power_negative: float = 3.0
    decay_negative: float = 2.0

    def __post_init__(self) -> None:
        powers, decays = (self.power_positive, self.power_negative), (self.decay_positive, self.decay_negative)
        if not (min(powers) >= 0 and min(decays) > 0):
            raise RecipeError(f"VESPO's powers must not be negative and its decays positive, not {powers} and {decays}")
        if self.correction.mode.startswith("sequence"):
            raise RecipeError(
                "VESPO multiplies the weights of a sequence's tokens itself: set the correction to token_truncate, "
                f"token_mask or none instead of {self.correction.mode}"
            )

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        mask_N = self.mask(batch)
        advantages_N = zeroed(batch.advantages_N, mask_N)
        token_log_N = log_ratio(output.logprobs_N, batch.old_logprobs_N, mask_N).detach()
        correction_N = self.correction.weights(batch, mask_N)
        since_sampling_N = token_log_N + correction_N.log().clamp(_LEAST_LOG, LOG_RATIO_LIMIT)
        log_S = sequence_sums(since_sampling_N, batch).clamp(_LEAST_LOG, LOG_RATIO_LIMIT)
        log_N = log_S[batch.sequence_N]
        good_N = advantages_N >= 0
        power_N = _either(good_N, self.power_positive, self.power_negative, like=log_N)
        decay_N = _either(good_N, self.decay_positive, self.decay_negative, like=log_N)
        # Of the logarithm, since a large w would make the power infinite before the exponential makes it nothing.
        gate_N = (power_N * log_N + decay_N * (1 - log_N.exp())).exp()
        loss_N = -gate_N * advantages_N * zeroed(output.logprobs_N, mask_N)
        metrics_N = {
            "ratio": token_log_N.exp(),
            "gate": gate_N,
            "kl_old": token_log_N.exp() - 1 - token_log_N,
            "correction": correction_N,
        }
        return TokenLoss(loss_N, mask_N, metrics_N)


def _either(mask_N: Tensor, inside: float, outside: float, *, like: Tensor) -> Tensor:
    return torch.where(mask_N, like.new_tensor(inside), like.new_tensor(outside))
