"""Attention among packed sequences as one operation with a gradient of its own, on processors.

Sequences are padded together into buckets and the queries of a bucket cut into pieces. Left to autograd, each piece
costs a gradient as long as its bucket, and each change of layout a copy there and back. Here tokens are gathered once,
straight into the layout of PyTorch's fused kernel, and gradients are added up where they belong.

A row is one head of one token. Dimension suffixes: R rows, D head width, otherwise as in
:mod:`rehearsal.models.packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What F.scaled_dot_product_attention itself calls on a processor. Its gradient has a name that is PyTorch's own
# affair: where there is no such operator, packs are computed without this module.
_FORWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


class Piece(NamedTuple):
    """Queries of a bucket, from ``start`` to ``stop``, and how many of the keys any of them sees."""

    start: int
    stop: int
    n_keys: int


@dataclass
class Layout:
    """Where the heads of each token lie in the buckets' layout: (sequence, key head, query and its heads, width).

    Args:
        sizes: of each bucket the sequences, the queries and the keys.
        query_index, key_index: for each place in the buckets the token there, bucket by bucket; (sum of n q,) and
            (sum of n k,).
        places_T: for each token its place among the queries.
        pieces: of each bucket; none if it is not cut.
    """

    sizes: Sequence[tuple[int, int, int]]
    query_index: Tensor
    key_index: Tensor
    places_T: Tensor
    pieces: Sequence[Sequence[Piece]]
    _rows: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def query_rows(self, H: int, G: int, step: int) -> Tensor:
        """The row of a (T, H, D) tensor at each row of the buckets' queries; tokens are ``step`` rows apart."""
        return self._cached(("query", H, G, step), self._placed, self.query_index, 1, G, H // G, step)

    def key_rows(self, G: int, step: int) -> Tensor:
        """The same for keys and values."""
        return self._cached(("key", G, step), self._placed, self.key_index, 2, G, 1, step)

    def own_rows(self, H: int, G: int) -> Tensor:
        """For each row of a (T, H, D) tensor its row among those of the buckets' queries."""
        return self._cached(("own", H, G), self._own, H, G)

    def _cached(self, key: tuple[Any, ...], make: Any, *given: Any) -> Tensor:
        if key not in self._rows:
            self._rows[key] = make(*given)
        return self._rows[key]

    def _placed(self, index: Tensor, which: int, G: int, shared: int, step: int) -> Tensor:
        heads_Gs = torch.arange(G * shared).view(G, 1, shared)
        parts, begin = [], 0
        for size in self.sizes:
            n, length = size[0], size[which]
            tokens_nq = index[begin : begin + n * length].view(n, 1, length, 1)
            parts.append((tokens_nq * step + heads_Gs).reshape(-1))
            begin += n * length
        return torch.cat(parts)

    def _own(self, H: int, G: int) -> Tensor:
        shared = H // G
        parts, begin = [], 0
        for n, q, _ in self.sizes:
            rows = torch.arange(begin * H, (begin + n * q) * H).view(n, G, q, shared).transpose(1, 2)
            parts.append(rows.reshape(n * q, H))
            begin += n * q
        return torch.cat(parts).index_select(0, self.places_T).reshape(-1)


def serves(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> bool:
    """Whether :func:`packed_kernel` can compute this."""
    return (
        _FORWARD is not None
        and _BACKWARD is not None
        and query_THD.device.type == "cpu"
        and query_THD.dtype in (torch.float32, torch.float64)
        and query_THD.dtype == key_TGD.dtype == value_TGD.dtype
        and query_THD.shape[-1] == key_TGD.shape[-1] == value_TGD.shape[-1]
    )


def packed_kernel(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, layout: Layout, biases: Sequence[Tensor], scaling: float
) -> Tensor:
    """Attention output of shape (T, H, D).

    Args:
        query_THD, key_TGD, value_TGD: what :func:`serves` is true for.
        layout: of the buckets.
        biases: of each bucket what is added to its scores, (n, 1, q * shared, k).
        scaling: what scores are multiplied by first.
    """
    if torch.is_grad_enabled() and (query_THD.requires_grad or key_TGD.requires_grad or value_TGD.requires_grad):
        return _PackedAttention.apply(query_THD, key_TGD, value_TGD, layout, biases, scaling)
    return _forward(query_THD, key_TGD, value_TGD, layout, biases, scaling)[0]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, layout: Layout, biases: Sequence[Tensor],
        scaling: float,
    ) -> Tensor:  # fmt: skip
        out_THD, kept = _forward(query_THD, key_TGD, value_TGD, layout, biases, scaling)
        ctx.save_for_backward(*kept, *biases)
        ctx.layout, ctx.scaling, ctx.heads = layout, scaling, (query_THD.shape[1], key_TGD.shape[1])
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        H, G = ctx.heads
        layout: Layout = ctx.layout
        query_RD, key_RD, value_RD, *rest = ctx.saved_tensors
        biases = rest[-len(layout.sizes) :]
        own_R = layout.own_rows(H, G)
        D = grad_THD.shape[-1]
        # What stands where no token is has no gradient.
        grad_RD = query_RD.new_zeros(query_RD.shape).index_copy_(0, own_R, grad_THD.reshape(-1, D))
        to_query_RD = torch.empty_like(query_RD)
        to_key_RD, to_value_RD = torch.empty_like(key_RD), torch.empty_like(value_RD)
        cuts = _cuts(layout, biases, G, D, (query_RD, grad_RD, to_query_RD), (key_RD, value_RD, to_key_RD, to_value_RD))
        kept = iter(rest)
        for bias, pieces, (query, grad, to_query), (key, value, to_key, to_value) in cuts:
            # The first piece sees all keys.
            for number, (start, stop, n_keys) in enumerate(pieces):
                out, logsumexp = next(kept), next(kept)
                found = _BACKWARD(
                    grad[:, :, start:stop], query[:, :, start:stop], key[:, :, :n_keys], value[:, :, :n_keys], out,
                    logsumexp, 0.0, False, attn_mask=bias[:, :, start:stop, :n_keys], scale=ctx.scaling,
                )  # fmt: skip
                to_query[:, :, start:stop] = found[0]
                for sums, part in ((to_key, found[1]), (to_value, found[2])):
                    if number == 0:
                        sums.copy_(part)
                    else:
                        sums[:, :, :n_keys] += part
        to_query_THD = to_query_RD.index_select(0, own_R).view(grad_THD.shape)
        T = len(grad_THD)
        rows_RD = layout.key_rows(G, G)[:, None].expand(-1, D)
        to_key_TGD, to_value_TGD = (
            sums_RD.new_zeros(T * G, D).scatter_add_(0, rows_RD, sums_RD).view(T, G, D)
            for sums_RD in (to_key_RD, to_value_RD)
        )
        return to_query_THD, to_key_TGD, to_value_TGD, None, None, None


def _forward(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, layout: Layout, biases: Sequence[Tensor], scaling: float
) -> tuple[Tensor, list[Tensor]]:
    """The output, and what the gradient needs of the way there."""
    T, H, D = query_THD.shape
    G = key_TGD.shape[1]
    (from_query_RD, query_step), (from_key_RD, key_step), (from_value_RD, value_step) = map(
        _as_rows, (query_THD, key_TGD, value_TGD)
    )
    query_RD = from_query_RD.index_select(0, layout.query_rows(H, G, query_step))
    key_RD = from_key_RD.index_select(0, layout.key_rows(G, key_step))
    value_RD = from_value_RD.index_select(0, layout.key_rows(G, value_step))
    out_RD = torch.empty_like(query_RD)
    kept = [query_RD, key_RD, value_RD]
    for bias, pieces, (query, into), (key, value) in _cuts(
        layout, biases, G, D, (query_RD, out_RD), (key_RD, value_RD)
    ):
        for start, stop, n_keys in pieces:
            out, logsumexp = _FORWARD(
                query[:, :, start:stop], key[:, :, :n_keys], value[:, :, :n_keys], 0.0, False,
                attn_mask=bias[:, :, start:stop, :n_keys], scale=scaling,
            )  # fmt: skip
            into[:, :, start:stop] = out
            kept += [out, logsumexp]
    return out_RD.index_select(0, layout.own_rows(H, G)).view(T, H, D), kept


def _cuts(
    layout: Layout, biases: Sequence[Tensor], G: int, D: int, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]
) -> list[tuple[Tensor, list[Piece], list[Tensor], list[Tensor]]]:
    """Bucket by bucket its bias, its pieces (counted in rows of a key head, the one that sees all keys first), and its
    parts of tensors of rows, as (n, G, rows, D)."""
    found, at_query, at_key = [], 0, 0
    for (n, q, k), bias, pieces in zip(layout.sizes, biases, layout.pieces, strict=True):
        shared = bias.shape[2] // q
        cut = [Piece(start * shared, stop * shared, n_keys) for start, stop, n_keys in pieces or [Piece(0, q, k)]]
        rows_q, rows_k = n * G * q * shared, n * G * k
        queries = [tensor[at_query : at_query + rows_q].view(n, G, q * shared, D) for tensor in of_queries]
        keys = [tensor[at_key : at_key + rows_k].view(n, G, k, D) for tensor in of_keys]
        found.append((bias, sorted(cut, key=lambda piece: -piece.n_keys), queries, keys))
        at_query, at_key = at_query + rows_q, at_key + rows_k
    return found


def _as_rows(heads_TXD: Tensor) -> tuple[Tensor, int]:
    """A tensor of heads as (R, D), without a copy where they lie one behind the other, and the rows from one token to
    the next."""
    T, X, D = heads_TXD.shape
    if heads_TXD.stride()[1:] != (D, 1) or heads_TXD.stride(0) % D or heads_TXD.stride(0) < X * D:
        heads_TXD = heads_TXD.contiguous()
    step = heads_TXD.stride(0) // D if T > 1 else X
    return heads_TXD.as_strided(((T - 1) * step + X, D), (D, 1)), step
