"""Log-probs and entropies of chosen tokens from hidden states, without keeping the logits.

A vocabulary of 150,000 makes the logits of one step larger than the model; they are computed in chunks and computed
again in the backward pass, so memory stays at one chunk and, on a processor, within its cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rehearsal.models.packed import logits_of

_CHUNK_ENTRIES = 1 << 20
"""Logits of one chunk: 4 MiB in float32."""


def _chunk(
    model: Any, hidden_ND: Tensor, targets_N: Tensor, temperature: float | Tensor, entropy: bool
) -> tuple[Tensor, Tensor]:
    logits_NV = logits_of(model, hidden_ND).float()
    if isinstance(temperature, Tensor):
        logits_NV = logits_NV / temperature[:, None]
    elif temperature != 1.0:
        logits_NV = logits_NV / temperature
    normaliser_N = torch.logsumexp(logits_NV, dim=-1)
    logprobs_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - normaliser_N
    if not entropy:
        return logprobs_N, logprobs_N.new_empty(0)
    probs_NV = (logits_NV - normaliser_N[:, None]).exp()
    return logprobs_N, normaliser_N - (probs_NV * logits_NV).sum(dim=-1)


def token_certainties(model: Any, hidden_ND: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(uniform || p) of the distribution after each hidden state, nats, float32 of shape (N,), without gradient."""
    vocabulary = model.config.get_text_config().vocab_size
    size = max(64, _CHUNK_ENTRIES // vocabulary)
    parts = [hidden_ND.new_empty(0, dtype=torch.float32)]
    for start in range(0, len(hidden_ND), size):
        logits_NV = logits_of(model, hidden_ND[start : start + size]).float() / temperature
        normaliser_N = torch.logsumexp(logits_NV, dim=-1)
        parts.append(normaliser_N - logits_NV.mean(dim=-1) - math.log(logits_NV.shape[-1]))
    return torch.cat(parts)


def token_ranks(model: Any, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of ``targets_N`` after each hidden state, float32 of shape (N,), and whether each is the likeliest
    token, bool of shape (N,); without gradient."""
    vocabulary = model.config.get_text_config().vocab_size
    size = max(64, _CHUNK_ENTRIES // vocabulary)
    logprobs = [hidden_ND.new_empty(0, dtype=torch.float32)]
    likeliest = [torch.empty(0, dtype=torch.bool, device=hidden_ND.device)]
    for start in range(0, len(hidden_ND), size):
        targets = targets_N[start : start + size]
        logits_NV = logits_of(model, hidden_ND[start : start + size]).float()
        logprobs.append(logits_NV.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits_NV, dim=-1))
        likeliest.append(logits_NV.argmax(dim=-1) == targets)
    return torch.cat(logprobs), torch.cat(likeliest)


def token_logprobs(
    model: Any, hidden_ND: Tensor, targets_N: Tensor, *, temperature: float | Tensor = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of ``targets_N`` after each hidden state, and the entropies of those distributions, in nats.

    Both belong to the distribution at ``temperature``, which must be the one that was sampled at; otherwise the first
    importance ratio is not 1.

    Args:
        model: the causal LM whose output head is used.
        hidden_ND: last hidden states, (N, width).
        targets_N: int64 token ids, (N,).
        temperature: one for all, or float32 of shape (N,).

    Returns:
        logprobs and entropies (None unless asked for), float32 of shape (N,), both with gradient.
    """
    vocabulary = model.config.get_text_config().vocab_size
    size = max(64, _CHUNK_ENTRIES // vocabulary)
    parts = []
    for start in range(0, len(targets_N), size):
        hidden, targets = hidden_ND[start : start + size], targets_N[start : start + size]
        warmth = temperature[start : start + size] if isinstance(temperature, Tensor) else temperature
        if torch.is_grad_enabled() and hidden_ND.requires_grad:
            parts.append(checkpoint(_chunk, model, hidden, targets, warmth, entropy, use_reentrant=False))
        else:
            parts.append(_chunk(model, hidden, targets, warmth, entropy))
    if not parts:
        empty = hidden_ND.new_empty(0, dtype=torch.float32)
        return empty, empty if entropy else None
    logprobs_N = torch.cat([part[0] for part in parts])
    return logprobs_N, torch.cat([part[1] for part in parts]) if entropy else None
