"""Reward models with random weights, small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_model(folder: Path, tokenizer: Any, labels: list[str], **changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, initializer_range=0.3,
        id2label=dict(enumerate(labels)), label2id={name: n for n, name in enumerate(labels)},
        pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip
    model = Qwen3ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
