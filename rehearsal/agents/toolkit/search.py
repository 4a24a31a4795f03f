"""Search over a local corpus, by words, by meaning or by both, and reading what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rehearsal.agents.toolbox import ToolSource
from rehearsal.agents.tools import Tool, tool_from
from rehearsal.environments.corpus import Corpus, read_corpus
from rehearsal.environments.reading import Reader, Searchable
from rehearsal.errors import ToolError

MODES = ("bm25", "embeddings", "hybrid")
"""How documents are ranked: by words, by the cosine of embeddings, or by both rankings joined."""


class Search(ToolSource):
    """The tools ``search(query)`` and ``open(document, page)``. All episodes share the corpus, which nothing changes.

    Args:
        corpus: a file of JSON lines, a folder of text files, or a list of mappings with "text" (see ``read_corpus``);
            or a :class:`~rehearsal.environments.corpus.Corpus`.
        results: documents that a search shows at most.
        words: of the snippet of each.
        page: characters of a document that ``open`` shows at a time.
        index: file for the index; memory if left out.
        embeddings: folder or hub name of an encoder, see :class:`~rehearsal.models.encoder.Encoder`.
        mode: one of :data:`MODES`; "hybrid" if left out and there are embeddings, else "bm25". With "bm25" an encoder
            that is named is not loaded.
        pooling, batch_size, device, dtype: of the encoder.
        passage_tokens: of a passage, into which longer documents are cut; what the encoder takes if left out.
        query_prefix, document_prefix: what the encoder expects before each; what its folder says if left out.
        cache: folder for embeddings, see :class:`~rehearsal.agents.toolkit.dense.DenseIndex`.

    Raises:
        ToolError: if the corpus cannot be read, for an unknown mode, or for options of embeddings without any.
        ModelError: if the encoder cannot be used.
    """

    fast = True

    def __init__(
        self, corpus: str | Path | Corpus | Sequence[Mapping[str, Any]], results: int = 5, words: int = 24,
        page: int = 1500, index: str | None = None, embeddings: str | Path | None = None, mode: str | None = None,
        pooling: str | None = None, passage_tokens: int | None = None, query_prefix: str | None = None,
        document_prefix: str | None = None, batch_size: int = 32, device: str = "cpu", dtype: str = "float32",
        cache: str | Path | None = None,
    ) -> None:  # fmt: skip
        if mode is None:
            mode = "bm25" if embeddings is None else "hybrid"
        if mode not in MODES:
            raise ToolError(f"There is no mode {mode!r} of search; use {', '.join(MODES[:-1])} or {MODES[-1]}.")
        if embeddings is None:
            given = {
                "pooling": pooling, "passage_tokens": passage_tokens, "query_prefix": query_prefix,
                "document_prefix": document_prefix, "cache": cache,
            }  # fmt: skip
            asked = [name for name, value in given.items() if value is not None]
            if mode != "bm25" or asked:
                what = f"The mode {mode!r}" if mode != "bm25" else f"The option {asked[0]}"
                raise ToolError(f"{what} of search needs an encoder; name its folder in embeddings.")
        self.corpus = corpus if isinstance(corpus, Corpus) else Corpus(read_corpus(corpus), index)
        # A query over a large corpus takes milliseconds, in which other episodes can go on.
        quick = len(self.corpus) <= 20_000
        searched: Searchable = self.corpus
        self.fast = quick
        if embeddings is not None and mode != "bm25":
            # Torch and transformers take seconds to load, and words alone need neither.
            from rehearsal.agents.toolkit.dense import DenseIndex, shared_encoder
            from rehearsal.agents.toolkit.fusion import FusedCorpus

            encoder = shared_encoder(
                embeddings, pooling=pooling, max_tokens=passage_tokens, batch_size=batch_size, device=device,
                dtype=dtype,
            )  # fmt: skip
            dense = DenseIndex(
                self.corpus.documents(), encoder, query_prefix=query_prefix, document_prefix=document_prefix,
                cache=cache,
            )  # fmt: skip
            searched = FusedCorpus(self.corpus, dense, hybrid=mode == "hybrid")
            self.fast = False  # an encoder takes milliseconds at best
        reader = Reader(searched, results, words, page)
        self._tools = [tool_from(reader.search, fast=self.fast), tool_from(reader.open, fast=quick)]

    def open(self) -> Sequence[Tool]:
        return self._tools

    def close(self) -> None:
        self.corpus.close()
