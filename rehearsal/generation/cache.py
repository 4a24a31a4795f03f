"""Keys and values of many episodes, and attention over them.

Each place (slot) holds one episode's keys and values for its whole context. Dimension suffixes as in
``rehearsal.models.packed``; S places, L positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rehearsal.models.packed import additive_mask, attention


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
    """Zeros; on a processor the system hands out their pages only as they are written.

    Masked positions are read too (as 0 times whatever is there), so memory that was never written must not hold NaN.
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(size)


class KeyValuePool:
    """Keys and values of S places with L positions each, for every layer."""

    def __init__(self, shapes: dict[int, LayerShape], n_slots: int, length: int, device: torch.device) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for layer, shape in shapes.items():
            size = (n_slots, shape.heads, length)
            self.keys[layer] = _lazy_zeros((*size, shape.key_width), shape.dtype, device)
            self.values[layer] = _lazy_zeros((*size, shape.value_width), shape.dtype, device)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions from one place to another."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[target, :, :length] = tensor[source, :, :length]

    def save(self, slot: int, length: int) -> list[Tensor]:
        """A copy of the first ``length`` positions of a place, to be put back by :meth:`load`."""
        return [tensor[slot, :, :length].clone() for tensor in (*self.keys.values(), *self.values.values())]

    def load(self, slot: int, saved: list[Tensor]) -> None:
        for tensor, part in zip((*self.keys.values(), *self.values.values()), saved, strict=True):
            tensor[slot, :, : part.shape[1]] = part


class CachePlan:
    """Attention of one engine step: some places read one token, others several.

    The packed row holds first the single tokens, in order of place, then the runs of the others.
    """

    # Below this share of decoding places it is cheaper to copy their keys together than to read past the others'.
    _DENSE = 0.6
    _ROWS_PER_PREFILL = 32

    def __init__(
        self,
        pool: KeyValuePool,
        decode_slots: np.ndarray,
        decode_positions: np.ndarray,
        prefill: list[tuple[int, int, int]],
        device: torch.device,
    ) -> None:
        """``prefill`` holds (place, first position, number of tokens) of each run; ``decode_slots`` ascend."""
        self._pool = pool
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
        keys[self._slots_T, :, self.positions_T] = key_TGD
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
            key = keys[:, :, :k].index_select(0, slots)
            value = values[:, :, :k].index_select(0, slots)
            if (number, window) not in self._prefill_biases:
                distance = query_positions_nq[:, :, None] - torch.arange(k, device=self._device)
                visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
                self._prefill_biases[number, window] = additive_mask(visible, shared, query.dtype)
            bias = self._prefill_biases[number, window]
            out = attention(query, key.transpose(1, 2), value.transpose(1, 2), bias, scaling, softcap)
            out_THD.index_copy_(0, targets, out.flatten(0, 1).index_select(0, rows))
        return out_THD

    def _decode(
        self, query_nHD: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        k = self._keys_length
        if self._span:
            places = slice(self._first, self._first + self._span)
            key, value = keys[places, :, :k], values[places, :, :k]
        else:
            key = keys[:, :, :k].index_select(0, self._decode_slots)
            value = values[:, :, :k].index_select(0, self._decode_slots)
        query = query_nHD
        if self._span and not self._all:
            query = query_nHD.new_zeros((self._span, *query_nHD.shape[1:])).index_copy_(0, self._decode_rows, query_nHD)
        if window not in self._decode_biases:
            distance = self._decode_positions[:, None] - torch.arange(k, device=self._device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            bias_nk = torch.zeros(hidden.shape, dtype=key.dtype, device=self._device).masked_fill_(hidden, -torch.inf)
            self._decode_biases[window] = bias_nk.repeat_interleave(key.shape[1], dim=0)[:, None]
        # With one query a place, two batched matrix products are faster than the fused kernel, on a processor.
        n, G, D = query.shape[0], key.shape[1], query.shape[2]
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        query = query.reshape(n * G, -1, D)
        bias = self._decode_biases[window]
        if softcap is None:
            scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scaling)
        else:
            scores = softcap * torch.tanh(torch.bmm(query, key.transpose(1, 2)) * (scaling / softcap)) + bias
        out = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value)
        out = out.view(n, -1, value.shape[-1])
        return out.index_select(0, self._decode_rows) if self._span and not self._all else out
