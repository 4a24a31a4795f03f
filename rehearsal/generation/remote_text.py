"""Token ids and the texts that servers take and give in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rehearsal.generation.remote_answers import RawAnswer


class TokenText:
    """Turns ids into text and back with a Hugging Face tokenizer, and says whether that was exact."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def prompt(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """The text that a server, which tokenises it with its special tokens added, turns into the ids.

        Returns:
            the text, and whether the tokenizer turns it into exactly these ids.
        """
        wanted = list(token_ids)
        text = self._decode(wanted)
        texts = [text]
        start = getattr(self._tokenizer, "bos_token", None)
        if start and text.startswith(start):
            texts.append(text[len(start) :])
        for candidate in texts:
            if list(self._tokenizer(candidate)["input_ids"]) == wanted:
                return candidate, True
        return texts[-1], False

    def answer(self, raw: RawAnswer) -> tuple[list[int], bool]:
        """The ids of an answer that came without them.

        Returns:
            the ids, and whether they are those that were sampled: the server then told the text of each token, and
            each is one token here.
        """
        ids = self._ids_of_tokens(raw)
        return (self._encode(raw.text), False) if ids is None else (ids, True)

    def _ids_of_tokens(self, raw: RawAnswer) -> list[int] | None:
        if not raw.tokens or "".join(raw.tokens) != raw.text:
            return None
        ids: list[int] = []
        for token in raw.tokens:
            found = self._encode(token)
            # One id, and no other text behind it: a lone byte of a longer character has no text of its own.
            if len(found) != 1 or self._decode(found) != token:
                return None
            ids += found
        return ids if self._decode(ids) == raw.text else None

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
