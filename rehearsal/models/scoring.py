"""Log-probs of given tokens under a model, many sequences at once and without gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from rehearsal.models.head import token_logprobs, token_ranks
from rehearsal.models.packed import causal_lm, packed_hidden
from rehearsal.models.packing import Pack, PackItem, make_packs
from rehearsal.models.parallel import map_packs, pack_workers


def target_logprobs(
    model: Any, items: Sequence[PackItem], *, temperature: float = 1.0, pack_tokens: int = 4096,
    share_prefixes: bool = True, precision: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[np.ndarray]:  # fmt: skip
    """Log-probs in nats of the target tokens of every sequence.

    Args:
        model: a Hugging Face causal LM.
        items: the sequences; neighbours of the same group that begin alike are read with one common prefix.
        temperature: of the distributions.
        pack_tokens: tokens of one forward pass.
        share_prefixes: whether common prefixes are read once.
        precision: makes the context that a forward pass runs in, such as autocast.

    Returns:
        float32 arrays, one a sequence, in order.
    """
    device = next(causal_lm(model).parameters()).device

    def logprobs_of(pack: Pack) -> np.ndarray:
        with precision():
            hidden_ND = packed_hidden(model, pack.token_ids_T, pack.positions_T, pack.plan, pack.sources_N)
            flat_N, _ = token_logprobs(causal_lm(model), hidden_ND, pack.targets_N, temperature=temperature)
        return flat_N.float().cpu().numpy()

    return each_target([model], items, logprobs_of, pack_tokens, share_prefixes, device, pack_workers(model))


def target_ranks(
    model: Any, items: Sequence[PackItem], *, pack_tokens: int = 4096, share_prefixes: bool = True
) -> list[np.ndarray]:
    """Log-probs in nats of the target tokens, and whether each is the likeliest one.

    Args:
        model, items, pack_tokens, share_prefixes: as for :func:`target_logprobs`.

    Returns:
        float32 arrays of shape (targets, 2), one a sequence, in order: log-prob, and 1 or 0.
    """
    device = next(causal_lm(model).parameters()).device

    def ranks_of(pack: Pack) -> np.ndarray:
        hidden_ND = packed_hidden(model, pack.token_ids_T, pack.positions_T, pack.plan, pack.sources_N)
        logprobs_N, likeliest_N = token_ranks(causal_lm(model), hidden_ND, pack.targets_N)
        return torch.stack([logprobs_N.float(), likeliest_N.float()], dim=1).cpu().numpy()

    return each_target([model], items, ranks_of, pack_tokens, share_prefixes, device, pack_workers(model))


@torch.no_grad()
def each_target(
    models: Sequence[Any], items: Sequence[PackItem], flat_of: Callable[[Pack], np.ndarray], pack_tokens: int,
    share_prefixes: bool, device: torch.device | str, workers: int,
) -> list[np.ndarray]:  # fmt: skip
    """A number, or a row of them, for every target token, by ``flat_of`` a pack; one array a sequence, in order."""
    packs = make_packs(items, pack_tokens, share_prefixes=share_prefixes, device=device, workers=workers)

    def work(pack: Pack) -> np.ndarray:
        flat = flat_of(pack)
        pack.plan.forget()
        return flat

    parts = list(map_packs(models, work, packs, workers))
    flat_N = np.concatenate(parts) if parts else np.empty(0, np.float32)
    ends = np.cumsum([len(item.targets) for item in items], dtype=np.int64)
    return np.split(flat_N, ends)[:-1]


__all__ = ["each_target", "target_logprobs", "target_ranks"]
