"""The terms of the loss: per-token losses with their masks, never a mean.

All of them are written for descent. A policy objective reads the advantages as constants; values that the formulas
stop the gradient of are marked by ``detach``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from rehearsal.algorithms.aggregation import Aggregation
from rehearsal.algorithms.batch import PolicyOutput, TokenBatch, TokenLoss
from rehearsal.algorithms.ratios import LOG_RATIO_LIMIT, ImportanceCorrection, log_ratio, sequence_sums
from rehearsal.errors import RecipeError

Importance = Literal["token", "sequence", "sequence_product"]
IMPORTANCES: tuple[str, ...] = get_args(Importance)

KLEstimator = Literal["k1", "k2", "k3", "k3+"]
KL_ESTIMATORS: tuple[str, ...] = get_args(KLEstimator)

KL_LIMIT = 10.0
"""The value of the k3 estimator is cut to plus or minus this (as in verl)."""


def zeroed(values_N: Tensor, mask_N: Tensor) -> Tensor:
    """The values inside the mask and 0 outside, with no gradient from outside."""
    return torch.where(mask_N, values_N, values_N.new_zeros(()))


@dataclass(frozen=True)
class PolicyObjective(ABC):
    """What the objectives of the policy have in common: an advantage times something of the ratio present / old.

    Attributes:
        correction: for what was sampled by another policy than the one at the start of the step.
    """

    correction: ImportanceCorrection = field(default_factory=ImportanceCorrection, kw_only=True)
    aggregation: Aggregation = field(default_factory=Aggregation, kw_only=True)
    coefficient: float = field(default=1.0, kw_only=True)
    parameters: str = field(default="all", kw_only=True)
    name: str = field(default="policy", kw_only=True)

    needs_entropy: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False

    def mask(self, batch: TokenBatch) -> Tensor:
        """The batch's policy mask."""
        return batch.policy_mask_N

    @abstractmethod
    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        """The loss of each token."""


@dataclass(frozen=True)
class PolicyLoss(PolicyObjective):
    """The clipped surrogate of PPO (arXiv:1707.06347, eq. 7) and its kin.

    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), with

    - two bounds ("clip-higher", DAPO, arXiv:2503.14476, eq. 10);
    - dual clip (arXiv:1912.09729, eq. 5): where A < 0 the loss is at most -dual_clip A, so a single token that became
      very likely cannot take over the step. The same as TRL's ``delta`` as long as dual_clip >= 1 + clip_high;
    - ``importance="token"``: r is the token's present / old ratio;
    - ``importance="sequence"`` (GSPO, arXiv:2507.18071, section 4): every token has the ratio of its sequence,
      s_i = exp(mean over the sequence's tokens of log present - log old), in the form that leaves each token its own
      gradient, s_{i,t} = detach(s_i) present_t / detach(present_t) (eq. 14). The mean is over the tokens of the mask,
      so observations do not dilute it. Use it with ``sequence_mean``, as published, and with a ``sequence_*``
      correction: only with one weight for all tokens of a sequence is it the gradient of s_i A. With ``constant`` a
      sequence counts by its length, which is LUSPO (arXiv:2602.05261), up to the scale;
    - ``importance="sequence_product"``: the same with the sum in place of the mean, so every token has the ratio of the
      probabilities of its whole sequence. With ``constant`` the gradient is that of the clipped s_i A of a sequence,
      which is TRL's loss for RLOO. Such ratios leave the clip quickly where sequences are long;
    - the loss is multiplied by the weights of ``correction`` (no gradient, 1 when the step is on-policy).

    A log-ratio beyond +-20 counts as +-20 and has no gradient. With one update for each rollout r is 1, nothing is
    clipped, and the gradient is that of REINFORCE.

    Metrics: ``ratio``; ``clipped_low`` (A < 0, r below the lower bound) and ``clipped_high`` (A > 0, r above the upper
    one), 0 or 1: tokens without gradient; ``dual_clipped``; ``kl_old``, the k3 estimate of KL(old || present), from
    token ratios; ``correction``.

    Attributes:
        clip_low: how far below 1 the ratio still counts where A < 0. From 1 on there is no bound.
        clip_high: how far above 1 the ratio still counts where A > 0.
        dual_clip: cap of the ratio where A < 0, above 1; None for none.
        importance: "token", "sequence" or "sequence_product".

    Raises:
        RecipeError: for values out of range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    importance: Importance = "token"

    def __post_init__(self) -> None:
        if not (self.clip_low >= 0 and self.clip_high >= 0):
            raise RecipeError(
                f"clip_low and clip_high must not be negative, and are {self.clip_low} and {self.clip_high}"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise RecipeError(f"dual_clip must be larger than 1, or left out, and is {self.dual_clip}")
        if self.importance not in IMPORTANCES:
            raise RecipeError(f"there is no importance {self.importance!r}: choose one of {', '.join(IMPORTANCES)}")

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        mask_N = self.mask(batch)
        advantages_N = zeroed(batch.advantages_N, mask_N)
        token_log_N = log_ratio(output.logprobs_N, batch.old_logprobs_N, mask_N)
        ratio_N = (token_log_N if self.importance == "token" else self._sequence_log(token_log_N, batch)).exp()

        surrogate_N = torch.minimum(
            ratio_N * advantages_N, ratio_N.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages_N
        )
        negative_N = advantages_N < 0
        dual_clipped_N = torch.zeros_like(negative_N)
        if self.dual_clip is not None:
            floor_N = self.dual_clip * advantages_N
            dual_clipped_N = negative_N & (surrogate_N < floor_N)
            surrogate_N = torch.where(negative_N, torch.maximum(surrogate_N, floor_N), surrogate_N)
        correction_N = self.correction.weights(batch, mask_N)

        with torch.no_grad():
            metrics_N = {
                "ratio": ratio_N.detach(),
                "clipped_low": ((ratio_N < 1 - self.clip_low) & negative_N).float(),
                "clipped_high": ((ratio_N > 1 + self.clip_high) & (advantages_N > 0)).float(),
                "dual_clipped": dual_clipped_N.float(),
                "kl_old": token_log_N.exp() - 1 - token_log_N,
                "correction": correction_N,
            }
        return TokenLoss(zeroed(-surrogate_N * correction_N, mask_N), mask_N, metrics_N)

    def _sequence_log(self, token_log_N: Tensor, batch: TokenBatch) -> Tensor:
        """log s_{i,t}: the value of the sequence's mean or sum, the gradient of the token's own log-probability."""
        fixed_N = token_log_N.detach()
        logs_S = sequence_sums(fixed_N, batch)
        if self.importance == "sequence":
            logs_S = logs_S / sequence_sums(self.mask(batch).to(fixed_N.dtype), batch).clamp(min=1)
        return logs_S.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)[batch.sequence_N] + (token_log_N - fixed_N)


@dataclass(frozen=True)
class CISPOLoss(PolicyObjective):
    """CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4): -detach(clip(r, ratio_low, ratio_high)) A log present.

    The weight is clipped, the gradient is not: every token keeps pulling, also one whose ratio has left the range.

    One knob goes by three meanings in public code; here both bounds are values of the ratio itself.

    ==============================  ==========================================  ================================
    published as                    clips the ratio to                          here
    ==============================  ==========================================  ================================
    TRL, ScaleRL: epsilon_high e    at most e (5.0 is usual)                    ratio_low=0, ratio_high=e
    open-instruct: clip_higher e    at most 1 + e                               ratio_low=0, ratio_high=1 + e
    MiniMax-M1, verl: e_lo, e_hi    1 - e_lo .. 1 + e_hi                        ratio_low=max(0, 1 - e_lo),
                                                                                ratio_high=1 + e_hi
    ==============================  ==========================================  ================================

    Metrics: ``ratio``, ``clipped_low``, ``clipped_high`` (whatever the sign of A), ``kl_old``, ``correction``.

    Attributes:
        ratio_low: the smallest weight, between 0 and 1.
        ratio_high: the largest weight, at least 1.

    Raises:
        RecipeError: unless 0 <= ratio_low <= 1 <= ratio_high.
    """

    ratio_low: float = 0.0
    ratio_high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio_low <= 1 <= self.ratio_high:
            raise RecipeError(
                "CISPO's bounds are values of the ratio and must satisfy 0 <= ratio_low <= 1 <= ratio_high, "
                f"not {self.ratio_low} and {self.ratio_high}"
            )

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        mask_N = self.mask(batch)
        token_log_N = log_ratio(output.logprobs_N, batch.old_logprobs_N, mask_N).detach()
        ratio_N = token_log_N.exp()
        correction_N = self.correction.weights(batch, mask_N)
        weights_N = ratio_N.clamp(self.ratio_low, self.ratio_high) * correction_N
        loss_N = -weights_N * zeroed(batch.advantages_N, mask_N) * zeroed(output.logprobs_N, mask_N)
        metrics_N = {
            "ratio": ratio_N,
            "clipped_low": (ratio_N < self.ratio_low).float(),
            "clipped_high": (ratio_N > self.ratio_high).float(),
            "kl_old": ratio_N - 1 - token_log_N,
            "correction": correction_N,
        }
        return TokenLoss(loss_N, mask_N, metrics_N)


@dataclass(frozen=True)
class KLLoss:
    """Keeps the policy near a frozen reference: an estimate of KL(present || reference) from each sampled token.

    With d = log reference - log present, cut to +-20 (Schulman, "Approximating KL divergence", 2020):

    ========  ====================================  ===================================================================
    estimator value                                 gradient, expected over tokens that the present policy sampled
    ========  ====================================  ===================================================================
    ``k1``    -d (unbiased, noisy, may be negative)  0: as a loss it only adds noise. Good as a metric.
    ``k2``    d^2 / 2 (biased, low variance)         that of KL(present || reference)
    ``k3``    e^d - 1 - d, cut to +-10 (unbiased)    that of KL(reference || present), the other direction
    ``k3+``   the value of k3                        the gradient of k2: the value and the gradient that were meant
    ========  ====================================  ===================================================================

    So ``k2`` and ``k3+`` push as the penalty in the paper's formula would; ``k3`` is what GRPO (arXiv:2402.03300,
    eq. 4) and TRL have. Beyond its cut k3 has no gradient (at d > 2.6: a token that became 13 times less likely is not
    pulled back); the others have one up to |d| = 20. Off-policy tokens are not reweighted. The log-probability of the
    reference has to be under the same temperature.

    Metrics: ``kl``, the value.

    Raises:
        RecipeError: for an unknown estimator.
    """

    coefficient: float = 0.001
    estimator: KLEstimator = "k3+"
    aggregation: Aggregation = field(default_factory=Aggregation)
    parameters: str = "all"
    name: str = "kl"

    needs_entropy: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_values: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.estimator not in KL_ESTIMATORS:
            raise RecipeError(f"there is no KL estimator {self.estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")

    def mask(self, batch: TokenBatch) -> Tensor:
        """The batch's policy mask."""
        return batch.policy_mask_N

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        if batch.reference_logprobs_N is None:
            raise ValueError("the KL objective needs reference_logprobs_N in its batch")
        mask_N = self.mask(batch)
        d_N = -log_ratio(output.logprobs_N, batch.reference_logprobs_N, mask_N)
        if self.estimator == "k1":
            loss_N = -d_N
        elif self.estimator == "k2":
            loss_N = d_N**2 / 2
        else:
            loss_N = (d_N.exp() - 1 - d_N).clamp(-KL_LIMIT, KL_LIMIT)
            if self.estimator == "k3+":
                with_gradient_N = d_N**2 / 2
                loss_N = with_gradient_N + (loss_N - with_gradient_N).detach()
        return TokenLoss(loss_N, mask_N, {"kl": loss_N.detach()})


@dataclass(frozen=True)
class EntropyBonus:
    """Rewards the policy for keeping its options open: -entropy of each token's distribution.

    Metrics: ``entropy``, nats.
    """

    coefficient: float = 0.001
    aggregation: Aggregation = field(default_factory=Aggregation)
    parameters: str = "all"
    name: str = "entropy"

    needs_entropy: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False

    def mask(self, batch: TokenBatch) -> Tensor:
        """The batch's policy mask."""
        return batch.policy_mask_N

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        if output.entropy_N is None:
            raise ValueError("the entropy objective needs entropy_N in the policy's output")
        mask_N = self.mask(batch)
        entropy_N = zeroed(output.entropy_N, mask_N)
        return TokenLoss(-entropy_N, mask_N, {"entropy": entropy_N.detach()})


@dataclass(frozen=True)
class ValueLoss:
    """The clipped squared error of PPO's critic: max((v - R)^2, (clip(v, old v - clip, old v + clip) - R)^2) / 2.

    It learns from every token that has a return, whether or not a filter keeps the policy from learning there.

    Metrics: ``error`` (v - R), ``clipped`` (the clipped error is the larger one).

    Attributes:
        clip: how far a value may move from the old one in one step, in units of the reward; None for no bound. verl's
            default is 0.5, that of TRL's PPO 0.2.

    Raises:
        RecipeError: for a clip that is not positive.
    """

    clip: float | None = 0.5
    coefficient: float = 0.1
    aggregation: Aggregation = field(default_factory=Aggregation)
    parameters: str = "all"
    name: str = "value"

    needs_entropy: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise RecipeError(f"value_clip must be positive, or left out, and is {self.clip}")

    def mask(self, batch: TokenBatch) -> Tensor:
        """The tokens that have a return."""
        if batch.returns_N is None:
            raise ValueError("the value objective needs returns_N in its batch")
        return ~batch.returns_N.isnan()

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        mask_N = self.mask(batch)
        if output.values_N is None or batch.old_values_N is None or batch.returns_N is None:
            raise ValueError("the value objective needs values_N in the output, and old_values_N in the batch")
        values_N = zeroed(output.values_N, mask_N)
        returns_N = zeroed(batch.returns_N, mask_N)
        errors_N = (values_N - returns_N) ** 2
        clipped_N = torch.zeros_like(mask_N)
        losses_N = errors_N
        if self.clip is not None:
            old_N = zeroed(batch.old_values_N, mask_N)
            near_N = torch.maximum(torch.minimum(values_N, old_N + self.clip), old_N - self.clip)
            clipped_errors_N = (near_N - returns_N) ** 2
            clipped_N = clipped_errors_N > errors_N
            losses_N = torch.maximum(errors_N, clipped_errors_N)
        metrics_N = {"error": (values_N - returns_N).detach(), "clipped": clipped_N.float()}
        return TokenLoss(losses_N / 2, mask_N, metrics_N)
