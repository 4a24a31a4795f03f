"""How the next token is drawn, and with which noise.

The noise of a draw is a hash of (seed, episode, position), so an episode gets the same numbers whoever shares the
batch with it and in whatever order episodes run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rehearsal.errors import GenerationError, RecipeError

_NOT_FINITE = "The model's logits are not finite, so no token can be drawn; load weights from before they diverged."
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SamplingParams:
    """The distribution to sample a turn from, and when to stop.

    Attributes:
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p; 1 keeps all.
        max_tokens: the most tokens that one call samples.
        stop_token_ids: tokens that end the turn; the one that ended it is part of the sample.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise RecipeError(f"temperature must be 0 or more, not {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            raise RecipeError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        if self.top_k < 0:
            raise RecipeError(f"top_k must be 0 (all tokens) or more, not {self.top_k}.")
        if self.max_tokens < 1:
            raise RecipeError(f"max_tokens must be 1 or more, not {self.max_tokens}.")

    @property
    def truncates(self) -> bool:
        """Whether some tokens get probability zero, so that log-probs are renormalised over the rest."""
        return self.temperature == 0.0 or self.top_k > 0 or self.top_p < 1.0

    @property
    def distribution(self) -> tuple[float, int, float]:
        """What rows must share to be drawn together."""
        return (self.temperature, self.top_k, self.top_p)


def stream_key(*parts: int | str) -> int:
    """A 64-bit key of a stream of noise, from whatever names it: (seed, split, episode seed, sample, ...)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(keys_R: np.ndarray, positions_R: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (stream, position), float64 of shape (R,).

    SplitMix64 (Steele, Lea and Flood, 2014) as a counter-based generator: stateless, so any position can be asked for.
    """
    with np.errstate(over="ignore"):
        z = keys_R.astype(np.uint64) + (positions_R.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits_RV: Tensor, uniforms_R: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Returns:
        ids of shape (R,) and their log-probs under the distribution that was sampled from, temperature and truncation
        included (0 for greedy decoding, whose distribution is one token).

    Raises:
        GenerationError: if logits are not a number.
    """
    if params.temperature == 0.0:
        ids_R = logits_RV.argmax(dim=-1)
        if bool(logits_RV.gather(1, ids_R[:, None]).isnan().any()):
            raise GenerationError(_NOT_FINITE)
        return ids_R, torch.zeros(ids_R.shape, dtype=torch.float32, device=ids_R.device)
    logits_RV = logits_RV.float()
    if params.temperature != 1.0:
        logits_RV = logits_RV / params.temperature
    logprobs_RV = torch.log_softmax(truncate(logits_RV, params), dim=-1)
    cumulative_RV = logprobs_RV.exp().cumsum(dim=-1)
    # The last entry stands for 1 whatever rounding made of it; a token of probability zero is never hit, because its
    # cumulative value equals its left neighbour's and the search takes the first entry that exceeds the target.
    total_R1 = cumulative_RV[:, -1:].contiguous()
    target_R1 = uniforms_R.to(cumulative_RV)[:, None] * total_R1
    ids_R1 = torch.searchsorted(cumulative_RV, target_R1, right=True)
    # Rounding can push the target up to the total: the token that reached it is the last one of non-zero probability.
    ids_R1 = torch.minimum(ids_R1, torch.searchsorted(cumulative_RV, total_R1))
    chosen_R = logprobs_RV.gather(1, ids_R1.clamp(max=logits_RV.shape[-1] - 1))[:, 0]
    if bool(chosen_R.isnan().any()):
        raise GenerationError(_NOT_FINITE)
    return ids_R1[:, 0], chosen_R


def truncate(logits_RV: Tensor, params: SamplingParams) -> Tensor:
    """Logits with minus infinity for the tokens that top-k and top-p (in this order) leave out."""
    if 0 < params.top_k < logits_RV.shape[-1]:
        kth_R1 = logits_RV.topk(params.top_k, dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < kth_R1, float("-inf"))
    if params.top_p < 1.0:
        sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
        probs_RV = sorted_RV.softmax(dim=-1)
        # A token stays if the probability before it has not yet reached p; the likeliest always stays.
        dropped_RV = (probs_RV.cumsum(dim=-1) - probs_RV) >= params.top_p
        dropped_RV[:, 0] = False
        logits_RV = logits_RV.masked_fill(dropped_RV.scatter(1, order_RV, dropped_RV), float("-inf"))
    return logits_RV
