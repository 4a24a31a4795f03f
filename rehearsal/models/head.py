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

from rehearsal.models.fused import is_plain
from rehearsal.models.packed import causal_lm, logits_of

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


def _plain_head(model: Any, hidden_ND: Tensor) -> Tensor | None:
    """The weight of an output head that does nothing but multiply by it, in float32; None for any other."""
    lm = causal_lm(model)
    head, config = lm.get_output_embeddings(), lm.config.get_text_config()
    changed = any(
        getattr(config, name, None) is not None for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    if changed or type(head) is not torch.nn.Linear or head.bias is not None or not is_plain(head):
        return None
    same = hidden_ND.dtype == torch.float32 and not torch.is_autocast_enabled(hidden_ND.device.type)
    return head.weight if same else None


class _PlainHead(torch.autograd.Function):
    """Log-probs and entropies behind ``hidden @ weight.T / temperature``, with the gradient written out.

    What the forward pass keeps of the logits z is the logarithm n of their normaliser and the mean m of z under p, a
    number each a token. With p = exp(z - n) the gradients by z are onehot - p of the log-prob and -p (z - m) of the
    entropy.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature_N1: Tensor | None,
        entropy: bool, size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        N = len(targets_N)
        normaliser_N, logprobs_N = hidden_ND.new_empty(N), hidden_ND.new_empty(N)
        mean_N = hidden_ND.new_empty(N if entropy else 0)
        for rows in _rows(N, size):
            logits_NV = _cooled(torch.mm(hidden_ND[rows], weight_VD.t()), temperature_N1, rows)
            chosen_N = logits_NV.gather(1, targets_N[rows, None])[:, 0]
            most_N1 = logits_NV.amax(dim=-1, keepdim=True)
            shares_NV = logits_NV.sub_(most_N1).exp()
            sum_N = shares_NV.sum(dim=-1)
            normaliser_N[rows] = sum_N.log() + most_N1[:, 0]
            logprobs_N[rows] = chosen_N - normaliser_N[rows]
            if entropy:
                mean_N[rows] = shares_NV.mul_(logits_NV).sum(dim=-1) / sum_N + most_N1[:, 0]
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, temperature_N1, normaliser_N, mean_N)
        ctx.size = size
        ctx.set_materialize_grads(False)
        return logprobs_N, normaliser_N - mean_N if entropy else mean_N

    @staticmethod
    def backward(ctx: Any, to_logprobs_N: Tensor | None, to_entropies_N: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, temperature_N1, normaliser_N, mean_N = ctx.saved_tensors
        to_hidden_ND = torch.zeros_like(hidden_ND)
        to_weight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        for rows in _rows(len(targets_N), ctx.size):
            z_NV = _cooled(torch.mm(hidden_ND[rows], weight_VD.t()), temperature_N1, rows)
            z_NV.sub_(normaliser_N[rows, None])
            if to_entropies_N is None:
                to_z_NV = z_NV.exp_()
                to_z_NV.mul_(0.0 if to_logprobs_N is None else -to_logprobs_N[rows, None])
            else:
                p_NV = z_NV.exp()
                # z - m, for z less its normaliser.
                factor_NV = z_NV.sub_((mean_N[rows] - normaliser_N[rows])[:, None]).mul_(to_entropies_N[rows, None])
                if to_logprobs_N is not None:
                    factor_NV.add_(to_logprobs_N[rows, None])
                to_z_NV = p_NV.mul_(factor_NV).neg_()
            if to_logprobs_N is not None:
                to_z_NV.scatter_add_(1, targets_N[rows, None], to_logprobs_N[rows, None])
            _cooled(to_z_NV, temperature_N1, rows)
            torch.mm(to_z_NV, weight_VD, out=to_hidden_ND[rows])
            if to_weight_VD is not None:
                to_weight_VD.addmm_(to_z_NV.t(), hidden_ND[rows])
        return to_hidden_ND, to_weight_VD, None, None, None, None


def _cooled(values_NV: Tensor, temperature_N1: Tensor | None, rows: slice) -> Tensor:
    """The values over the temperatures of these rows, in place; None is 1."""
    return values_NV if temperature_N1 is None else values_NV.div_(temperature_N1[rows])


def _rows(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


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
    if torch.is_grad_enabled() and hidden_ND.requires_grad and (weight := _plain_head(model, hidden_ND)) is not None:
        warmth_N1: Tensor | None = None
        if isinstance(temperature, Tensor):
            warmth_N1 = temperature[:, None]
        elif temperature != 1.0:
            warmth_N1 = hidden_ND.new_full((), temperature).expand(len(targets_N), 1)
        logprobs_N, entropies_N = _PlainHead.apply(hidden_ND, weight, targets_N, warmth_N1, entropy, size)
        return logprobs_N, entropies_N if entropy else None
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
