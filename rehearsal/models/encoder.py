"""Embeddings of texts by a Hugging Face encoder: one unit vector a text, whose products are cosines."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rehearsal.errors import ModelError
from rehearsal.models.encoder_folder import declared_by
from rehearsal.models.load import pick_device, quiet_transformers

POOLINGS = ("mean", "cls", "last")
"""What becomes of the vectors of a text's tokens: their mean, the first one, or the last one."""
DTYPES = ("float32", "bfloat16")
MOST_TOKENS = 512
"""Of a text, where nothing else is said: what most encoders were trained with, also those that would take more."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model",
                    "sentencepiece.bpe.model", "tokenizer.model")  # fmt: skip


class Encoder:
    """Embeds texts; any number of threads may ask it at once, and are served one after the other.

    A causal language model may be an encoder too, with mean or last pooling. A folder that sentence-transformers wrote
    says how it pools, how long a text may be and what goes before queries and documents; that holds where nothing else
    is asked for.

    Args:
        source: a Hugging Face folder, from which nothing is fetched, or a hub name.
        pooling: one of :data:`POOLINGS`; what the folder says if None, or "mean" if it says nothing.
        max_tokens: of a text, special tokens included, the rest of which is cut off; if None, what the folder says, or
            what the model takes but :data:`MOST_TOKENS` at most.
        batch_size: texts in one forward pass.
        device: see :func:`~rehearsal.models.load.pick_device`.
        dtype: of weights and activations; pooling is float32 in any case.

    Attributes:
        source: as given.
        pooling, max_tokens: in force.
        prefixes: what the folder says goes before a "query" and a "document".
        dimension: numbers of an embedding.

    Raises:
        ModelError: for a folder without weights or tokenizer, a model of another kind, or a value that cannot be used.
    """

    def __init__(
        self, source: str | Path, *, pooling: str | None = None, max_tokens: int | None = None, batch_size: int = 32,
        device: str = "cpu", dtype: str = "float32",
    ) -> None:  # fmt: skip
        _check(pooling, max_tokens, batch_size, dtype)
        try:
            where = pick_device(device)
        except ModelError as error:
            raise ModelError(f'There is no device {device!r} for an encoder here; use "cpu" or "cuda".') from error
        self.source = str(source)
        folder = Path(source).expanduser()
        local = folder.exists() or self.source.startswith((".", "/", "~"))
        place = str(folder) if local else self.source
        if local:
            _check_folder(folder)
        self._tokenizer, self._model, made_up = _loaded(place, local, getattr(torch, dtype))
        self._made_up = made_up
        config = self._model.config.get_text_config()
        if config.is_encoder_decoder:
            raise ModelError(f"{place} is an encoder with a decoder, which is not supported; give an encoder alone.")
        if len(self._tokenizer) > config.vocab_size:
            raise ModelError(
                f"The tokenizer of {place} has {len(self._tokenizer)} tokens and the model only {config.vocab_size}; "
                "they do not belong together."
            )
        declared = declared_by(place, local, pooling)
        self.pooling = declared.pooling if pooling is None else pooling
        self.prefixes = declared.prefixes
        # Both, because some models have positions that they never use, such as RoBERTa's first two.
        takes = min(getattr(config, "max_position_embeddings", None) or math.inf, self._tokenizer.model_max_length)
        if max_tokens is not None and max_tokens > takes:
            raise ModelError(f"The model {place} takes {int(takes)} tokens of a text, not {max_tokens}.")
        usual = min(takes, declared.max_tokens or MOST_TOKENS)
        self.max_tokens = int(usual) if max_tokens is None else max_tokens
        self.batch_size = batch_size
        self.dimension = int(config.hidden_size)
        self._pad = next(i for i in (self._tokenizer.pad_token_id, config.pad_token_id, 0) if i is not None)
        self._lock = threading.Lock()
        self._model.to(where)
        if self.pooling == "cls" and self._is_causal():
            raise ModelError(
                f'The first token of {place} sees no other one, so pooling "cls" would give all texts one embedding; '
                'use "last" or "mean".'
            )

    def token_ids(self, texts: Sequence[str], *, cut: bool = True) -> list[np.ndarray]:
        """The tokens of texts with the special ones around them, as int32.

        Args:
            texts: without a prefix of their own.
            cut: to ``max_tokens``, special tokens kept.
        """
        if not texts:
            return []
        with self._lock:  # a fast tokenizer is changed by whoever calls it, and fails if two do
            encoded = self._tokenizer(
                list(texts), truncation=cut, max_length=self.max_tokens if cut else None, padding=False,
                return_attention_mask=False, return_token_type_ids=False, verbose=False,
            )  # fmt: skip
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The embeddings of texts, float32 of shape (texts, dimension), each of length 1; zero for a text that has no
        tokens.

        Raises:
            ModelError: if the model fails or gives numbers that are not finite.
        """
        return self.embed_tokens(self.token_ids(texts))

    def embed_tokens(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        """As :meth:`embed`, of what :meth:`token_ids` gave. Those of like length go together, the longest first, so
        that little is padded and too little memory shows at once."""
        found_ND = np.zeros((len(ids), self.dimension), np.float32)
        order = sorted((i for i in range(len(ids)) if len(ids[i])), key=lambda i: -len(ids[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            try:
                pooled_BD = pool(*self._hidden([ids[i] for i in chosen]), self.pooling)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                told = " ".join(str(error).split())[:200]
                raise ModelError(f"The encoder {self.source} cannot embed {len(chosen)} texts of up to "
                                 f"{len(ids[chosen[0]])} tokens at a time: {told}") from error  # fmt: skip
            found_ND[chosen] = torch.nn.functional.normalize(pooled_BD, dim=-1).cpu().numpy()
        if not np.isfinite(found_ND).all():
            raise ModelError(f"The encoder {self.source} gives embeddings that are not finite; use another one.")
        return found_ND

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of all that decides what tokens become: weights, configuration, pooling and type of numbers."""
        hidden = ("_name_or_path", "transformers_version")
        config = {name: value for name, value in self._model.config.to_dict().items() if name not in hidden}
        parts = [config, self.pooling, str(self._model.dtype), transformers.__version__]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            if name in self._made_up:
                continue  # drawn anew with every load, and not used
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _hidden(self, ids: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """The last hidden states of texts in a batch that is padded at the end, and which of them are no padding."""
        width = max(len(one) for one in ids)
        ids_BT = torch.full((len(ids), width), self._pad)
        mask_BT = torch.zeros((len(ids), width), dtype=torch.long)
        for row, one in enumerate(ids):
            ids_BT[row, : len(one)] = torch.from_numpy(one.astype(np.int64))
            mask_BT[row, : len(one)] = 1
        device = next(self._model.parameters()).device
        mask_BT = mask_BT.to(device)
        with self._lock, torch.inference_mode():
            output = self._model(input_ids=ids_BT.to(device), attention_mask=mask_BT)
        return output.last_hidden_state, mask_BT

    def _is_causal(self) -> bool:
        """Whether a token's hidden state is the same whatever follows it."""
        several = [np.asarray([0, *[other] * 3], np.int32) for other in range(min(4, len(self._tokenizer)))]
        first_BD = self._hidden(several)[0][:, 0].float()
        rounding = 1e-5 if self._model.dtype == torch.float32 else 1e-2
        return bool(torch.allclose(first_BD[1:], first_BD[:1].expand_as(first_BD[1:]), atol=rounding, rtol=0.0))


def pool(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a text out of those of its tokens, float32.

    Args:
        hidden_BTD: of the tokens.
        mask_BT: 1 for a token, 0 for padding, at whichever end; a text has a token at least.
        pooling: one of :data:`POOLINGS`.
    """
    hidden_BTD = hidden_BTD.float()
    if pooling == "mean":
        weights_BT1 = mask_BT.unsqueeze(-1).float()
        # Not by multiplication alone: what stands at padding may be anything, NaN too.
        return hidden_BTD.masked_fill(weights_BT1 == 0, 0.0).sum(dim=1) / weights_BT1.sum(dim=1)
    places_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand_as(mask_BT)
    if pooling == "cls":
        chosen_B = places_BT.masked_fill(mask_BT == 0, mask_BT.shape[1]).min(dim=1).values
    else:
        chosen_B = places_BT.masked_fill(mask_BT == 0, -1).max(dim=1).values
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), chosen_B]


def _check(pooling: str | None, max_tokens: int | None, batch_size: int, dtype: str) -> None:
    for name, value, known in (("pooling", pooling, (None, *POOLINGS)), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ModelError(f"There is no {name} {value!r}; use {' or '.join(one for one in known if one)}.")
    for name, count, least in (("max_tokens", max_tokens, 8), ("batch_size", batch_size, 1)):
        given = count is not None
        if given and (isinstance(count, bool) or not isinstance(count, int) or count < least):
            raise ModelError(f"{name} of an encoder must be a whole number from {least} on, not {count!r}.")


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no config.json.")
    # The library makes one up for a folder that has none: with an empty vocabulary, and without a word.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer; save it there with tokenizer.save_pretrained({str(folder)!r}).")


def _loaded(place: str, local: bool, dtype: torch.dtype) -> tuple[Any, Any, frozenset[str]]:
    """Tokenizer and model, and the names of weights that the folder does not have."""
    try:
        # Weights that are missing are drawn: nobody else's random numbers may change by it.
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=local)
            model, told = transformers.AutoModel.from_pretrained(
                place, local_files_only=local, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # whatever a third-party loader raises is about this folder
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"The encoder {place} cannot be loaded: {said}") from error
    made_up = frozenset(told["missing_keys"])
    # What BERT computes on top of its first token is used by none of the poolings.
    lost = sorted(name for name in made_up if not name.startswith("pooler."))
    if lost:
        raise ModelError(f"{place} lacks weights of its model, such as {lost[0]}; give the folder of a whole model.")
    tokenizer.truncation_side = "right"
    return tokenizer, model.eval().requires_grad_(False), made_up
