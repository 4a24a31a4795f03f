"""How many floating-point operations a training step needs, whatever way it is computed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rehearsal.models.packed import causal_lm
from rehearsal.models.packing import PackItem, common_prefix
from rehearsal.trajectory import Group

MATRIX = 2048
"""Rows and columns of the product of matrices whose speed learning is compared with."""
PRODUCT_FLOPS = 2.0 * MATRIX**3


def items_of(groups: Sequence[Group]) -> list[PackItem]:
    """The sequences of a step as the learner packs them."""
    return [
        PackItem(segment.token_ids, segment.sampled_mask.nonzero()[0], number)
        for number, group in enumerate(groups)
        for trajectory in group
        for segment in trajectory.segments
    ]


def decoder_weights(model: Any) -> int:
    """Weights of the decoder's matrix products; neither the embedding nor the head."""
    decoder = causal_lm(model).get_decoder()
    return sum(module.weight.numel() for module in decoder.modules() if isinstance(module, torch.nn.Linear))


def training_flops(model: Any, tokens: int, targets: int, pairs: int) -> float:
    """Operations of a forward and a backward pass; a multiplication and an addition are two.

    A matrix product takes 2 operations for each weight and token in the forward pass and 4 in the backward pass. The
    head counts for the targets alone. Attention takes 4 operations for each pair of a query and a key that it sees,
    each head and each of its widths, and twice that backward. What is computed again to save memory is not counted.

    Args:
        tokens: that the decoder reads.
        targets: tokens whose log-probability is wanted.
        pairs: of a query and a key that it may look at, in one layer.
    """
    config = causal_lm(model).config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * pairs * config.num_attention_heads * width * config.num_hidden_layers
    head = 6 * targets * config.vocab_size * config.hidden_size
    return float(6 * decoder_weights(model) * tokens + head + attention)


def packed_counts(items: Sequence[PackItem], packs: Sequence[Sequence[int]], share: bool) -> tuple[int, int]:
    """Tokens that are read, and pairs of attention, when sequences are packed in this way.

    Args:
        items: the sequences.
        packs: which of them each pack holds.
        share: whether a pack reads the prefix that a group has in common once.
    """
    tokens = pairs = 0
    for members in packs:
        by_group: dict[int, list[int]] = {}
        for index in members:
            by_group.setdefault(items[index].group, []).append(len(items[index].token_ids))
        for group, lengths in by_group.items():
            shared = 0
            if share and len(lengths) > 1:
                sequences = [items[i].token_ids for i in members if items[i].group == group]
                shared = min(common_prefix(sequences), min(lengths) - 1)
            tokens += shared + sum(length - shared for length in lengths)
            pairs += shared * (shared + 1) // 2
            # A query at position p of its sequence sees p + 1 keys.
            pairs += sum((length * (length + 1) - shared * (shared + 1)) // 2 for length in lengths)
    return tokens, pairs
