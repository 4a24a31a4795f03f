"""One engine step, cut into blocks.

A narrow model reads a step in blocks whose activations stay in the processor's cache, one after the other: its
operators are so short that threads would spend their time handing Python's lock to one another. A wide model, or one on
a GPU, gets its step whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rehearsal.generation.cache import CachePlan, KeyValuePool
from rehearsal.generation.sampling import SamplingParams, draw, uniforms
from rehearsal.generation.weights import WeightWatch
from rehearsal.models.packed import AttentionPlan, fused_decoder, is_narrow, logits_of, packed_hidden

Forward = Callable[[Tensor, Tensor, AttentionPlan, Tensor | None], Tensor]
"""Token ids, positions, plan and wanted rows of a pass, to hidden states."""

_DECODE_ROWS = 128
_PREFILL_TOKENS = 256
_LOOK = 256
"""Tokens that are compared at a time."""


class Run(NamedTuple):
    """New text of one place: where it begins, its tokens, and whether a token is drawn after the last of them."""

    slot: int
    first: int
    token_ids: np.ndarray
    draws: bool


@dataclass
class Block:
    """Rows of a step: places that read the token that they drew last, in ascending order, and runs of new text.

    Attributes:
        shared: how many of their first tokens these places have in common, as far as it is of use.
    """

    slots: np.ndarray
    positions: np.ndarray
    token_ids: np.ndarray
    runs: list[Run] = field(default_factory=list)
    shared: int = 0


class Streams(NamedTuple):
    """What a draw depends on beside the logits, by place: noise, position, and which of ``kinds`` it is drawn with."""

    keys_S: np.ndarray
    lengths_S: np.ndarray
    kind_S: np.ndarray
    kinds: Sequence[SamplingParams]


class Drawn(NamedTuple):
    """One token for each of some places."""

    slots_R: np.ndarray
    token_ids_R: np.ndarray
    logprobs_R: np.ndarray


def cut_blocks(slots: np.ndarray, positions: np.ndarray, token_ids: np.ndarray, runs: list[Run]) -> list[Block]:
    """The blocks of a step for a narrow model: up to 128 single tokens, or runs of about 256 tokens."""
    blocks = [
        Block(slots[i : i + _DECODE_ROWS], positions[i : i + _DECODE_ROWS], token_ids[i : i + _DECODE_ROWS])
        for i in range(0, len(slots), _DECODE_ROWS)
    ]
    nobody = np.empty(0, dtype=np.int64)
    size = _PREFILL_TOKENS
    for run in runs:
        if size + len(run.token_ids) > _PREFILL_TOKENS:
            blocks.append(Block(nobody, nobody, nobody))
            size = 0
        blocks[-1].runs.append(run)
        size += len(run.token_ids)
    return blocks


def common_tokens(token_ids_SL: np.ndarray, slots: np.ndarray, most: int) -> int:
    """How many of their first ``most`` tokens some places have in common."""
    for begin in range(0, most, _LOOK):
        token_ids_nT = token_ids_SL[slots, begin : min(begin + _LOOK, most)]
        differs_T = (token_ids_nT != token_ids_nT[0]).any(axis=0)
        if differs_T.any():
            return begin + int(differs_T.argmax())
    return most


class BlockRunner:
    """Runs blocks through a model.

    Args:
        model: in evaluation mode, with packed attention switched on.
        pool: keys and values of the places.
        device: of both.
        watch: of the model's weights.
    """

    def __init__(self, model: Any, pool: KeyValuePool, device: torch.device, watch: WeightWatch) -> None:
        self.model = model
        self.narrow = is_narrow(model)
        self._pool = pool
        self._device = device
        self._watch = watch
        watch.renew()
        self._forwards: dict[int, Forward] = {}
        self._forward: Forward = self._plain
        self._weights = -1

    def run(self, blocks: list[Block], streams: Streams) -> list[Drawn]:
        """The tokens drawn in each block.

        Raises:
            GenerationError: if logits are not a number.
        """
        self._refresh()
        drawn = [self._block(block, streams) for block in blocks]
        self._watch.passed()
        return drawn

    def _refresh(self) -> None:
        """Joined weights are copies: make them anew if somebody has changed the weights since."""
        self._weights, alive = self._watch.look()
        for gone in self._forwards.keys() - alive:
            del self._forwards[gone]
        if self._weights not in self._forwards:
            with torch.inference_mode():
                fused = fused_decoder(self.model)
            self._forwards[self._weights] = fused or self._plain
        self._forward = self._forwards[self._weights]

    def _plain(
        self, token_ids_T: Tensor, positions_T: Tensor, plan: AttentionPlan, rows_R: Tensor | None
    ) -> Tensor:  # fmt: skip
        return packed_hidden(self.model, token_ids_T, positions_T, plan, rows_R)

    @torch.inference_mode()
    def _block(self, block: Block, streams: Streams) -> Drawn:
        n = len(block.slots)
        token_ids = np.concatenate([block.token_ids, *(run.token_ids for run in block.runs)]).astype(np.int64)
        spans = [(run.slot, run.first, len(run.token_ids)) for run in block.runs]
        read = np.concatenate([block.slots, [slot for slot, _, _ in spans]]).astype(np.int64)
        firsts = np.concatenate([block.positions, [first for _, first, _ in spans]])
        self._pool.computed_with(self._weights, read, firsts)
        plan = CachePlan(self._pool, block.slots, block.positions, spans, self._device, block.shared)
        last = n - 1 + np.cumsum([count for _, _, count in spans], dtype=np.int64)
        draws = np.array([run.draws for run in block.runs], dtype=bool)
        rows_R = np.concatenate([np.arange(n), last[draws]])
        slots_R = np.concatenate([block.slots, [run.slot for run in block.runs if run.draws]]).astype(np.int64)
        wanted = None if len(rows_R) == len(token_ids) else torch.from_numpy(rows_R).to(self._device)
        hidden_RW = self._forward(torch.from_numpy(token_ids).to(self._device), plan.positions_T, plan, wanted)
        if len(rows_R) == 0:
            return Drawn(slots_R, np.empty(0, np.int64), np.empty(0, np.float32))
        return self._draw(logits_of(self.model, hidden_RW), slots_R, streams)

    def _draw(self, logits_RV: Tensor, slots_R: np.ndarray, streams: Streams) -> Drawn:
        noise_R = uniforms(streams.keys_S[slots_R], streams.lengths_S[slots_R])
        uniforms_R = torch.from_numpy(noise_R).to(self._device)
        kind_R = streams.kind_S[slots_R]
        ids_R = np.empty(len(slots_R), dtype=np.int64)
        logprobs_R = np.empty(len(slots_R), dtype=np.float32)
        for kind in np.unique(kind_R):
            part = np.nonzero(kind_R == kind)[0]
            whole = len(part) == len(slots_R)
            index = torch.from_numpy(part).to(self._device)
            ids, logprobs = draw(
                logits_RV if whole else logits_RV[index], uniforms_R if whole else uniforms_R[index],
                streams.kinds[kind],
            )  # fmt: skip
            ids_R[part], logprobs_R[part] = ids.cpu().numpy(), logprobs.float().cpu().numpy()
        return Drawn(slots_R, ids_R, logprobs_R)
