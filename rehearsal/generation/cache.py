"""Keys and values of many episodes, and attention over them.

Each place (slot) holds one episode's keys and values for its whole context. Dimension suffixes as in
``rehearsal.models.packed``; S places, L positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rehearsal.models.packed import additive_mask, attention, visible_keys


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores for one token."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


class ShapeProbe:
    """An attention plan that records what each layer would store; run once, on a single token."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(
        self,
        layer: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        self.shapes[layer] = LayerShape(key_TGD.shape[1], key_TGD.shape[2], value_TGD.shape[2], key_TGD.dtype)
        return value_TGD.repeat_interleave(query_THD.shape[1] // value_TGD.shape[1], dim=1)


def _lazy_zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a processor the system hands out their pages only as they are written (a place's keys lie in many, so
    theirs come with its first tokens).

    Masked positions are read too (as 0 times whatever is there), so memory that was never written must not hold NaN.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(size)


class Saved(NamedTuple):
    """Keys and values of one place, kept aside."""

    tensors: list[Tensor]
    weights: int


class KeyValuePool:
    """Keys and values of S places with L positions each, for every layer.

    Attributes:
        keys: by layer, (S, G, D, L): one query times many keys is half as fast again with the keys side by side.
        values: by layer, (S, G, L, D).
        weights_S: the number of the weights that computed what a place holds, -1 where it was more than one.
    """

    def __init__(self, shapes: dict[int, LayerShape], n_slots: int, length: int, device: torch.device) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.weights_S = np.full(n_slots, -1, dtype=np.int64)
        for layer, shape in shapes.items():
            size = (n_slots, shape.heads)
            self.keys[layer] = _lazy_zeros((*size, shape.key_width, length), shape.dtype, device)
            self.values[layer] = _lazy_zeros((*size, length, shape.value_width), shape.dtype, device)

    def _firsts(self, slot: int, length: int) -> list[Tensor]:
        """The first ``length`` positions of a place."""
        keys = [tensor[slot, :, :, :length] for tensor in self.keys.values()]
        return keys + [tensor[slot, :, :length] for tensor in self.values.values()]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions from one place to another."""
        self.load(target, length, Saved(self._firsts(source, length), int(self.weights_S[source])))

    def save(self, slot: int, length: int) -> Saved:
        """A copy of the first ``length`` positions of a place, to be put back by :meth:`load`."""
        return Saved([tensor.clone() for tensor in self._firsts(slot, length)], int(self.weights_S[slot]))

    def load(self, slot: int, length: int, saved: Saved) -> None:
        """Put back what was saved of the first ``length`` positions."""
        for own, part in zip(self._firsts(slot, length), saved.tensors, strict=True):
            own.copy_(part)
        self.weights_S[slot] = saved.weights

    def computed_with(self, weights: int, slots: np.ndarray, firsts: np.ndarray) -> None:
        """Note which weights compute the next positions of some places, and what the first of these is."""
        self.weights_S[slots] = np.where((firsts == 0) | (self.weights_S[slots] == weights), weights, -1)

    def alike(self, slots: np.ndarray) -> bool:
        """Whether places that hold the same tokens hold the same keys and values."""
        weights = self.weights_S[slots]
        return bool(weights[0] >= 0 and (weights == weights[0]).all())


class CachePlan:
    """Attention of one engine step: some places read one token, others several.

    The packed row holds first the single tokens, in order of place, then the runs of the others.

    Args:
        pool: keys and values.
        decode_slots: the places that read one token, ascending.
        decode_positions: where that token stands.
        prefill: place, first position and number of tokens of each run.
        device: of the pool.
        shared: how many of their first positions the single tokens' places have in common. The keys and values of these
            are read from one place for all, in one matrix product that is several times as fast.
    """

    # Below this share of decoding places it is cheaper to copy their keys together than to read past the others'.
    _DENSE = 0.4
    _ROWS_PER_PREFILL = 32

    def __init__(
        self,
        pool: KeyValuePool,
        decode_slots: np.ndarray,
        decode_positions: np.ndarray,
        prefill: list[tuple[int, int, int]],
        device: torch.device,
        shared: int = 0,
    ) -> None:
        self._pool = pool
        self._shared = shared
        self._device = device
        slots = [decode_slots, *(np.full(count, slot) for slot, _, count in prefill)]
        positions = [decode_positions, *(np.arange(first, first + count) for _, first, count in prefill)]
        positions_T = np.concatenate(positions).astype(np.int64)
        self.positions_T = torch.from_numpy(positions_T).to(device)
        self._slots_T = torch.from_numpy(np.concatenate(slots).astype(np.int64)).to(device)
        self._n_decode = len(decode_slots)
        self._decode_biases: dict[int | None, Tensor] = {}
        self._prefill_biases: dict[tuple[int, int | None], Tensor] = {}
        if self._n_decode:
            self._keys_length = int(decode_positions.max()) + 1
            # The places from the first to the last that decodes, if most of them do; otherwise none.
            self._first = int(decode_slots[0])
            self._span = int(decode_slots[-1]) + 1 - self._first
            self._span = self._span if self._n_decode >= self._DENSE * self._span else 0
            self._all = self._n_decode == self._span
            self._decode_slots = self._slots_T[: self._n_decode]
            self._decode_rows = self._decode_slots - self._first
            rows = decode_positions
            if self._span and not self._all:
                rows = np.zeros(self._span, dtype=np.int64)
                rows[decode_slots - self._first] = decode_positions
            self._decode_positions = torch.from_numpy(rows.astype(np.int64)).to(device)
        self._prefill = self._chunks(prefill)

    def _chunks(self, prefill: list[tuple[int, int, int]]) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]]:
        starts = self._n_decode + np.cumsum([0, *(count for _, _, count in prefill)])
        order = sorted(range(len(prefill)), key=lambda i: (prefill[i][2], prefill[i][1]))
        chunks: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]] = []
        for begin in range(0, len(order), self._ROWS_PER_PREFILL):
            part = order[begin : begin + self._ROWS_PER_PREFILL]
            q = max(prefill[i][2] for i in part)
            k = max(prefill[i][1] + prefill[i][2] for i in part)
            query_index, query_positions = np.zeros((len(part), q), np.int64), np.zeros((len(part), q), np.int64)
            rows, targets = [], []
            for row, i in enumerate(part):
                _, first, count = prefill[i]
                query_index[row, :count] = np.arange(starts[i], starts[i] + count)
                query_positions[row, :count] = np.arange(first, first + count)
                rows.append(row * q + np.arange(count))
                targets.append(np.arange(starts[i], starts[i] + count))
            slots = np.array([prefill[i][0] for i in part], dtype=np.int64)
            arrays = (query_index.reshape(-1), query_positions, np.concatenate(rows), np.concatenate(targets), slots)
            a, b, c, d, e = (torch.from_numpy(array).to(self._device) for array in arrays)
            chunks.append((a, b, c, d, e, k))
        return chunks

    def attend(
        self,
        layer: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        keys[self._slots_T, :, :, self.positions_T] = key_TGD
        values[self._slots_T, :, self.positions_T] = value_TGD
        n = self._n_decode
        decoded = self._decode(query_THD[:n], keys, values, scaling, window, softcap) if n else None
        if decoded is not None and not self._prefill:
            return decoded
        out_THD = query_THD.new_empty((*query_THD.shape[:2], value_TGD.shape[2]))
        if decoded is not None:
            out_THD[:n] = decoded
        shared = query_THD.shape[1] // key_TGD.shape[1]
        for number, (query_index, query_positions_nq, rows, targets, slots, k) in enumerate(self._prefill):
            query = query_THD.index_select(0, query_index).view(len(slots), -1, *query_THD.shape[1:])
            key = keys[..., :k].transpose(2, 3).index_select(0, slots)
            value = values[:, :, :k].index_select(0, slots)
            if (number, window) not in self._prefill_biases:
                key_positions_1k = torch.arange(k, device=self._device)[None]
                visible = visible_keys(query_positions_nq, key_positions_1k, window)
                self._prefill_biases[number, window] = additive_mask(visible, shared, query.dtype)
            bias = self._prefill_biases[number, window]
            out = attention(query, key.transpose(1, 2), value.transpose(1, 2), bias, scaling, softcap)
            out_THD.index_copy_(0, targets, out.flatten(0, 1).index_select(0, rows))
        return out_THD

    def _decode(
        self, query_nHD: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        k = self._keys_length
        # Whoever sees a window alone does not see all that is shared.
        common = self._shared if window is None or window >= k else 0
        first, key, value = self._first, keys[..., common:k], values[:, :, common:k]
        if self._span:
            key, value = key[first : first + self._span], value[first : first + self._span]
        else:
            key, value = key.index_select(0, self._decode_slots), value.index_select(0, self._decode_slots)
        query = query_nHD
        if self._span and not self._all:
            query = query_nHD.new_zeros((self._span, *query_nHD.shape[1:])).index_copy_(0, self._decode_rows, query_nHD)
        if window not in self._decode_biases:
            distance = self._decode_positions[:, None] - torch.arange(common, k, device=self._device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            bias_nk = torch.zeros(hidden.shape, dtype=key.dtype, device=self._device).masked_fill_(hidden, -torch.inf)
            self._decode_biases[window] = bias_nk.repeat_interleave(key.shape[1], dim=0)[:, None]
        of_all = (keys[first, ..., :common], values[first, :, :common]) if common else None
        out = _attend_once(query, key, value, self._decode_biases[window], scaling, softcap, of_all)
        return out.index_select(0, self._decode_rows) if self._span and not self._all else out


def _attend_once(
    query_nHD: Tensor, key_nGDk: Tensor, value_nGkD: Tensor, bias: Tensor, scaling: float, softcap: float | None,
    of_all: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Attention of one query for each of n places, (n, H, D).

    On a processor two batched matrix products are faster at this than the fused kernel.

    Args:
        bias: added to the scores, (n * G, 1, k).
        of_all: the keys, (G, D, c), and the values, (G, c, D), that come before those of every place.
    """
    n, G = key_nGDk.shape[:2]

    def scores(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        if softcap is None:
            return (
                torch.bmm(query, key).mul_(scaling) if bias is None else torch.baddbmm(bias, query, key, alpha=scaling)
            )
        capped = torch.bmm(query, key).mul_(scaling / softcap).tanh_().mul_(softcap)
        return capped if bias is None else capped.add_(bias)

    def turned(rows: Tensor, a: int, b: int) -> Tensor:
        """Rows by place and key head to rows by key head and place, or back."""
        return rows.view(a, b, -1, rows.shape[-1]).transpose(0, 1)

    query_BqD = query_nHD.reshape(n * G, -1, query_nHD.shape[-1])
    score_Bqk = scores(query_BqD, key_nGDk.flatten(0, 1), bias)
    if of_all is None:
        prob_Bqk = score_Bqk.softmax(-1, dtype=torch.float32).to(value_nGkD.dtype)
        return torch.bmm(prob_Bqk, value_nGkD.flatten(0, 1)).view(*query_nHD.shape[:2], -1)
    # All queries of a key head meet the keys of all places in one product.
    key_GDc, value_GcD = of_all
    common = key_GDc.shape[-1]
    score_GQc = scores(turned(query_BqD, n, G).reshape(G, -1, query_nHD.shape[-1]), key_GDc, None)
    score_Bqk = torch.cat([turned(score_GQc, G, n).reshape(n * G, -1, common), score_Bqk], dim=-1)
    prob_Bqk = score_Bqk.softmax(-1, dtype=torch.float32).to(value_nGkD.dtype)
    out = torch.bmm(prob_Bqk[..., common:], value_nGkD.flatten(0, 1))
    prob_GQc = turned(prob_Bqk[..., :common], n, G).reshape(G, -1, common)
    out += turned(torch.bmm(prob_GQc, value_GcD), G, n).reshape(out.shape)
    return out.view(*query_nHD.shape[:2], -1)
