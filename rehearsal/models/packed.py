"""Packed forward passes: many sequences in one row of tokens, with no padding in any linear layer.

Both the learner and the local engine call the model on inputs of shape (1, T) that hold tokens of many sequences.
Everything in a decoder but attention works on single tokens, so only attention must know where sequences begin. It is
told by a *plan* that travels through the model's keyword arguments to an attention function registered here; any
Hugging Face decoder that uses the library's attention interface works, and :func:`verify_packing` finds out at load
whether a given one does.

Dimension suffixes: T packed tokens, H query heads, G key/value heads, D head width, n sequences of a bucket, q queries,
k keys.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from rehearsal.errors import ModelError
from rehearsal.models.fused import FusedDecoder, fits
from rehearsal.models.packed_kernel import Layout, Piece, packed_kernel, serves

IMPLEMENTATION = "rehearsal_packed"


class AttentionPlan(Protocol):
    """What attention needs to know about a packed row of tokens."""

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
        """Attention output of shape (T, H, D)."""


def _packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packing: AttentionPlan | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if packing is None:
        raise ModelError("This model drops the arguments that packed sequences need; it cannot be used for training.")
    if s_aux is not None:
        raise ModelError("Models with attention sinks are not supported yet; use another model.")
    if dropout:
        raise ModelError("Attention dropout would make sampled and trained probabilities differ; set it to 0.")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out_THD = packing.attend(
        cast(int, module.layer_idx), query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
        scale, sliding_window, softcap,
    )  # fmt: skip
    return out_THD.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, _packed_attention)


def additive_mask(visible_nqk: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 where a key is visible, minus infinity elsewhere, (n, 1, q * shared, k).

    Args:
        visible_nqk: bool; every query must see a key.
        shared: query heads of each key head; their rows follow one another.
        dtype: of the queries.
    """
    seen, unseen = (visible_nqk.new_full((), value, dtype=dtype) for value in (0.0, float("-inf")))
    return torch.where(visible_nqk, seen, unseen).repeat_interleave(shared, dim=1)[:, None]


def visible_keys(query_positions_nq: Tensor, key_positions_nk: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees, (n, q, k): those that are not behind it, and with a window the last ones of those."""
    query_nq1, key_n1k = query_positions_nq[:, :, None], key_positions_nk[:, None, :]
    visible_nqk = query_nq1 >= key_n1k
    return visible_nqk if window is None else visible_nqk & (query_nq1 - window < key_n1k)


def attention(
    query_nqHD: Tensor, key_nkGD: Tensor, value_nkGD: Tensor, bias: Tensor, scaling: float, softcap: float | None,
    pieces: Sequence[Piece] = (),
) -> Tensor:  # fmt: skip
    """Masked attention over a batch of padded sequences, returned as (n, q, H, D).

    Query heads that share a key head are folded into the query dimension, so keys are never copied per head.

    Args:
        bias: from :func:`additive_mask`. It is made once and serves all layers: the fused kernel would make it anew
            from a boolean mask in each.
        pieces: that the queries are cut into, one after the other. The kernel computes what is masked too, so it is
            given the keys that are seen alone.
    """
    n, q, H, D = query_nqHD.shape
    G = key_nkGD.shape[2]
    shared = H // G
    # (n, q, G, shared, D) -> (n, G, q * shared, D): one row of the mask serves the `shared` heads of each query.
    query = query_nqHD.reshape(n, q, G, shared, D).transpose(1, 2).reshape(n, G, q * shared, D)
    key, value = key_nkGD.transpose(1, 2), value_nkGD.transpose(1, 2)
    if softcap is None:
        parts = [
            F.scaled_dot_product_attention(
                query[:, :, start * shared : stop * shared], key[:, :, :n_keys], value[:, :, :n_keys],
                attn_mask=bias[:, :, start * shared : stop * shared, :n_keys], scale=scaling,
            )
            for start, stop, n_keys in pieces or [Piece(0, q, key.shape[2])]
        ]  # fmt: skip
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    else:
        scores = softcap * torch.tanh(torch.matmul(query, key.transpose(-1, -2)) * (scaling / softcap)) + bias
        out = torch.matmul(scores.softmax(-1, dtype=torch.float32).to(value), value)
    return out.reshape(n, G, q, shared, value.shape[-1]).transpose(1, 2).reshape(n, q, H, value.shape[-1])


@dataclass(frozen=True)
class Span:
    """Where one sequence's own tokens lie in the pack, and the earlier tokens that it attends to as well.

    Attributes:
        start, stop: the sequence's own tokens.
        prefix: ranges of packed tokens that come before them, oldest first (a prompt that several sequences share).
    """

    start: int
    stop: int
    prefix: tuple[tuple[int, int], ...] = ()

    @property
    def n_keys(self) -> int:
        return self.stop - self.start + sum(stop - start for start, stop in self.prefix)


@dataclass
class _Bucket:
    n: int
    query_index: Tensor
    key_index: Tensor
    query_positions_nq: Tensor
    key_positions_nk: Tensor
    pieces: list[Piece]
    biases: dict[tuple[int | None, int, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, shared: int, dtype: torch.dtype) -> Tensor:
        key = (window, shared, dtype)
        if key not in self.biases:
            visible = visible_keys(self.query_positions_nq, self.key_positions_nk, window)
            self.biases[key] = additive_mask(visible, shared, dtype)
        return self.biases[key]


_PIECE = 128
"""Queries of a piece: fewer leave the kernel too little to do at a time, more have it compute more than is seen."""


def _pieces(query_positions_nq: np.ndarray, n_keys: int) -> list[Piece]:
    """The pieces of a bucket's queries; none where one would do."""
    most_q = np.minimum(query_positions_nq.max(axis=0) + 1, n_keys)
    starts = range(0, len(most_q), _PIECE)
    ends = [*starts[1:], len(most_q)]
    found = [Piece(start, end, int(most_q[start:end].max())) for start, end in zip(starts, ends, strict=True)]
    return found if len(found) > 1 else []


class PackedPlan:
    """Attention among packed sequences without a cache: what the learner uses.

    Sequences of similar length are padded together into buckets, for attention alone.
    """

    # A bucket may compute at most this many times the score entries that its sequences need.
    _WASTE = 1.2
    # More sequences at once bring nothing once a bucket's scores fill the processor's cache.
    _BUCKET_SCORES = 1 << 20

    def __init__(self, spans: Sequence[Span], n_tokens: int, device: torch.device | str = "cpu") -> None:
        self.n_tokens = n_tokens
        self.positions_T = np.zeros(n_tokens, dtype=np.int64)
        for span in spans:
            offset = span.n_keys - (span.stop - span.start)
            self.positions_T[span.start : span.stop] = np.arange(offset, span.n_keys)
        parts = self._split(spans)
        self._buckets = [self._bucket(part, device) for part in parts]
        self._n_queries = [len(bucket.query_index) for bucket in self._buckets]
        self._n_keys = [len(bucket.key_index) for bucket in self._buckets]
        self._query_index = torch.cat([bucket.query_index for bucket in self._buckets])
        self._key_index = torch.cat([bucket.key_index for bucket in self._buckets])
        self._rows_T = torch.from_numpy(self._rows(parts)).to(device)
        sizes = [(part.n, part.query_positions_nq.shape[1], part.key_positions_nk.shape[1]) for part in self._buckets]
        pieces = [bucket.pieces for bucket in self._buckets]
        self._layout = Layout(sizes, self._query_index, self._key_index, self._rows_T, pieces)

    def forget(self) -> None:
        """Let go of the masks: they take more room than all else that a pack keeps, and are made anew if need be."""
        for bucket in self._buckets:
            bucket.biases.clear()

    def _rows(self, parts: list[list[Span]]) -> np.ndarray:
        """For each token of the pack its row among the padded queries of all buckets."""
        rows_T = np.full(self.n_tokens, -1, dtype=np.int64)
        covered = begin = 0
        for spans in parts:
            width = max(span.stop - span.start for span in spans)
            for span in spans:
                own = span.stop - span.start
                rows_T[span.start : span.stop] = np.arange(begin, begin + own)
                covered, begin = covered + own, begin + width
        if covered != self.n_tokens or (rows_T < 0).any():
            raise ValueError(f"the spans cover {covered} of {self.n_tokens} packed tokens; each must be covered once")
        return rows_T

    def _split(self, spans: Sequence[Span]) -> list[list[Span]]:
        order = sorted(spans, key=lambda span: (span.n_keys, span.stop - span.start))
        parts: list[list[Span]] = []
        needed = longest_q = longest_k = 0
        for span in order:
            q, k = span.stop - span.start, span.n_keys
            total_q, total_k = max(longest_q, q), max(longest_k, k)
            size = (len(parts[-1]) + 1) * total_q * total_k if parts else 0
            if parts and size <= self._WASTE * (needed + q * k) and size <= max(self._BUCKET_SCORES, q * k):
                parts[-1].append(span)
                needed, longest_q, longest_k = needed + q * k, total_q, total_k
            else:
                parts.append([span])
                needed, longest_q, longest_k = q * k, q, k
        return parts

    def _bucket(self, spans: list[Span], device: torch.device | str) -> _Bucket:
        n = len(spans)
        q = max(span.stop - span.start for span in spans)
        k = max(span.n_keys for span in spans)
        query_index, key_index = np.zeros((n, q), np.int64), np.zeros((n, k), np.int64)
        # A padded query sees the first key (a softmax needs one); a padded key is seen by no query.
        query_positions = np.zeros((n, q), np.int32)
        key_positions = np.full((n, k), np.iinfo(np.int32).max, np.int32)
        for i, span in enumerate(spans):
            own = span.stop - span.start
            query_index[i, :own] = np.arange(span.start, span.stop)
            query_positions[i, :own] = np.arange(span.n_keys - own, span.n_keys)
            keys = [np.arange(start, stop) for start, stop in (*span.prefix, (span.start, span.stop))]
            key_index[i, : span.n_keys] = np.concatenate(keys)
            key_positions[i, : span.n_keys] = np.arange(span.n_keys)

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return _Bucket(
            n, tensor(query_index.reshape(-1)), tensor(key_index.reshape(-1)), tensor(query_positions),
            tensor(key_positions), _pieces(query_positions, k) if torch.device(device).type == "cpu" else [],
        )  # fmt: skip

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
        if softcap is None and serves(query_THD, key_TGD, value_TGD):
            shared = query_THD.shape[1] // key_TGD.shape[1]
            biases = [bucket.bias(window, shared, query_THD.dtype) for bucket in self._buckets]
            return packed_kernel(query_THD, key_TGD, value_TGD, self._layout, biases, scaling)
        # All buckets are gathered at once: the gradient of each gathering is as long as the pack.
        queries = query_THD.index_select(0, self._query_index).split(self._n_queries)
        keys = key_TGD.index_select(0, self._key_index).split(self._n_keys)
        values = value_TGD.index_select(0, self._key_index).split(self._n_keys)
        outputs = []
        for bucket, *parts in zip(self._buckets, queries, keys, values, strict=True):
            query, key, value = (part.view(bucket.n, -1, *part.shape[1:]) for part in parts)
            bias = bucket.bias(window, query.shape[2] // key.shape[2], query.dtype)
            out_nqHD = attention(query, key, value, bias, scaling, softcap, bucket.pieces)
            outputs.append(out_nqHD.flatten(0, 1))
        return torch.cat(outputs).index_select(0, self._rows_T)


def causal_lm(model: Any) -> PreTrainedModel:
    """The Hugging Face model inside ``model``, which may be wrapped by PEFT (adapters stay in place)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# A matrix product of this width keeps several threads of a processor busy.
_WIDE = 1024


def is_narrow(model: Any) -> bool:
    """Whether the operators of a model on a processor are too short to be split among threads.

    Most of the time would go to the threads' waiting for one another, and nearly all of it where another program takes
    one of the cores.
    """
    lm = causal_lm(model)
    on_processor = next(lm.parameters()).device.type == "cpu"
    return on_processor and int(lm.config.get_text_config().hidden_size) < _WIDE


_switches = threading.Lock()
_switched: dict[int, tuple[Any, int]] = {}
"""By id of a configuration: what its attention was before, and how many blocks hold it switched."""


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Route the attention of ``model`` through packed plans inside the block, and back afterwards.

    Blocks may be nested, and several threads may be inside one at the same time.
    """
    config = causal_lm(model).config.get_text_config()
    with _switches:
        before, inside = _switched.get(id(config), (config._attn_implementation, 0))
        _switched[id(config)] = (before, inside + 1)
        config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        with _switches:
            before, inside = _switched.pop(id(config))
            if inside == 1:
                config._attn_implementation = before
            else:
                _switched[id(config)] = (before, inside - 1)


def packed_hidden(
    model: Any, token_ids_T: Tensor, positions_T: Tensor, plan: AttentionPlan, rows_N: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Last hidden states of packed tokens, (T, width), or of those at ``rows_N`` alone, (N, width).

    Call inside :func:`packed_attention`.
    """
    if not kwargs and (fused := fused_decoder(model)) is not None:
        return fused(token_ids_T, positions_T, plan, rows_N)
    decoder = causal_lm(model).get_decoder()
    output = decoder(
        input_ids=token_ids_T[None], position_ids=positions_T[None], use_cache=False, packing=plan, **kwargs
    )
    hidden_TD = output.last_hidden_state[0]
    return hidden_TD if rows_N is None else hidden_TD.index_select(0, rows_N)


def fused_decoder(model: Any) -> FusedDecoder | None:
    """The decoder with joined weights and fewer operations, or None for a model that has to run as it is written."""
    lm = causal_lm(model)
    return FusedDecoder(lm) if is_narrow(lm) and fits(lm) else None


def logits_of(model: Any, hidden_ND: Tensor) -> Tensor:
    """Logits, (N, V), of last hidden states, with the output scaling that the model's configuration asks for."""
    lm = causal_lm(model)
    logits = lm.get_output_embeddings()(hidden_ND)
    config = lm.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def verify_packing(model: Any) -> None:
    """Check on a few tokens that a packed forward pass of ``model`` equals ordinary ones.

    Raises:
        ModelError: if it does not, with what to do.
    """
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    vocabulary = lm.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, vocabulary, (n,), generator=generator).to(device) for n in (5, 3))
    plan = PackedPlan([Span(0, 5), Span(5, 8)], 8, device)
    was_training = lm.training
    lm.eval()
    try:
        with torch.no_grad():
            expected = torch.cat([lm(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)])
            try:
                with packed_attention(model):
                    positions = torch.from_numpy(plan.positions_T).to(device)
                    actual = logits_of(model, packed_hidden(model, torch.cat([first, second]), positions, plan))
            except (TypeError, AttributeError, ValueError, RuntimeError) as error:
                raise ModelError(
                    f"{type(lm).__name__} does not run on packed sequences ({error}); use a decoder-only model whose "
                    "attention goes through the transformers attention interface."
                ) from error
    finally:
        lm.train(was_training)
    scale = float(expected.float().abs().max()) + 1e-6
    tolerance = 2e-2 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not torch.allclose(actual.float() / scale, expected.float() / scale, atol=tolerance):
        raise ModelError(
            f"{type(lm).__name__} gives other logits on packed sequences than on single ones (it mixes tokens outside "
            "of attention); use a decoder-only transformer without recurrent or convolutional layers."
        )
