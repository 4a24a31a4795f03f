"""Search over a local corpus, and reading what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rehearsal.agents.toolbox import ToolSource
from rehearsal.agents.toolkit.corpus import Corpus, read_corpus
from rehearsal.agents.tools import Tool, ToolFailure, tool_from
from rehearsal.environments.episode import whole_number


class Search(ToolSource):
    """The tools ``search(query)`` and ``open(document, page)``. All episodes share the corpus, which nothing changes.

    Args:
        corpus: a file of JSON lines, a folder of text files, or a list of mappings with "text" (see ``read_corpus``);
            or a :class:`~rehearsal.agents.toolkit.corpus.Corpus`.
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
        self.results = whole_number("results", results, 1, 100)
        self.words = whole_number("words", words, 1, 64)
        self.page = whole_number("page", page, 1, 1_000_000)
        self.corpus = corpus if isinstance(corpus, Corpus) else Corpus(read_corpus(corpus), index)
        # A query over a large corpus takes milliseconds, in which other episodes can go on.
        self.fast = len(self.corpus) <= 20_000
        self._tools = [
            tool_from(self.search, fast=self.fast), tool_from(self.open_document, name="open", fast=self.fast)
        ]  # fmt: skip

    def open(self) -> Sequence[Tool]:
        return self._tools

    def close(self) -> None:
        self.corpus.close()

    def search(self, query: str) -> str:
        """Finds documents by words, best first: the id of each in brackets, its title, and some of its words.

        Args:
            query: a few words to look for
        """
        hits = self.corpus.search(query, self.results, self.words)
        if not hits:
            return "Nothing was found; try other words."
        return "\n".join(f"[{hit.key}] {hit.title}{': ' if hit.title else ''}{hit.snippet}" for hit in hits)

    def open_document(self, document: str, page: int = 1) -> str:
        """Reads a document.

        Args:
            document: its id, as search shows it in brackets
            page: which part of a long one
        """
        found = self.corpus.get(document.strip().removeprefix("[").removesuffix("]"))
        if found is None:
            raise ToolFailure(f"there is no document {document[:60]!r}; search shows ids in brackets")
        pages = _pages(found.text, self.page)
        if not 1 <= page <= len(pages):
            raise ToolFailure(f"page must be from 1 to {len(pages)}, not {page}")
        head = f"{found.title}\n" if found.title and page == 1 else ""
        foot = f"\n(page {page} of {len(pages)})" if len(pages) > 1 else ""
        return f"{head}{pages[page - 1]}{foot}"


def _pages(text: str, size: int) -> list[str]:
    """A text in parts of at most ``size`` characters, cut at blanks where there are any near the end of a part."""
    pages: list[str] = []
    begin = 0
    while begin < len(text):
        end = begin + size
        if end < len(text):
            blank = max(text.rfind(" ", begin + size // 2, end), text.rfind("\n", begin + size // 2, end))
            end = blank + 1 if blank > 0 else end
        pages.append(text[begin:end])
        begin = end
    return pages or [""]
