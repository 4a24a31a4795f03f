"""Search over a local corpus, and reading what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rehearsal.agents.toolbox import ToolSource
from rehearsal.agents.tools import Tool, tool_from
from rehearsal.environments.corpus import Corpus, read_corpus
from rehearsal.environments.reading import Reader


class Search(ToolSource):
    """The tools ``search(query)`` and ``open(document, page)``. All episodes share the corpus, which nothing changes.

    Args:
        corpus: a file of JSON lines, a folder of text files, or a list of mappings with "text" (see ``read_corpus``);
            or a :class:`~rehearsal.environments.corpus.Corpus`.
        results: documents that a search shows at most.
        words: of the snippet of each.
        page: characters of a document that ``open`` shows at a time.
        index: file for the index; memory if left out.

    Raises:
        ToolError: if the corpus cannot be read.
    """

    fast = True

    def __init__(
        self, corpus: str | Path | Corpus | Sequence[Mapping[str, Any]], results: int = 5, words: int = 24,
        page: int = 1500, index: str | None = None,
    ) -> None:  # fmt: skip
        self.corpus = corpus if isinstance(corpus, Corpus) else Corpus(read_corpus(corpus), index)
        reader = Reader(self.corpus, results, words, page)
        # A query over a large corpus takes milliseconds, in which other episodes can go on.
        self.fast = len(self.corpus) <= 20_000
        self._tools = [tool_from(function, fast=self.fast) for function in (reader.search, reader.open)]

    def open(self) -> Sequence[Tool]:
        return self._tools

    def close(self) -> None:
        self.corpus.close()
