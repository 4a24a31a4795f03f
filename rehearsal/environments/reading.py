"""Looking for documents and reading them, as an agent does: text in and text out."""

from __future__ import annotations

from typing import Protocol

from rehearsal.environments.corpus import Document, Hit
from rehearsal.environments.episode import whole_number
from rehearsal.environments.tooling import ToolFailure


class Searchable(Protocol):
    """What a :class:`Reader` reads: a :class:`~rehearsal.environments.corpus.Corpus`, or something that ranks its
    documents in another way."""

    def search(self, query: str, count: int = 5, words: int = 24) -> list[Hit]:
        """Documents for a query, best first."""

    def get(self, key: str) -> Document | None:
        """The document of a key or title, if there is one."""


class Reader:
    """The tools ``search`` and ``open`` over a corpus.

    Args:
        corpus: of documents.
        results: documents that a search shows at most.
        words: of the snippet of each.
        page: characters of a document that ``open`` shows at a time.
    """

    def __init__(self, corpus: Searchable, results: int = 5, words: int = 24, page: int = 1500) -> None:
        self.corpus = corpus
        self.results = whole_number("results", results, 1, 100)
        self.words = whole_number("words", words, 1, 64)
        self.page = whole_number("page", page, 1, 1_000_000)

    def search(self, query: str) -> str:
        """Finds documents by words, best first: the id of each in brackets, its title, and some of its words.

        Args:
            query: a few words to look for
        """
        hits = self.corpus.search(query, self.results, self.words)
        if not hits:
            return "Nothing was found; try other words."
        return "\n".join(f"[{hit.key}] {hit.title}{': ' if hit.title else ''}{hit.snippet}" for hit in hits)

    def open(self, document: str, page: int = 1) -> str:
        """Reads a document.

        Args:
            document: its id, as search shows it in brackets
            page: which part of a long one
        """
        found = self.corpus.get(document.strip().removeprefix("[").removesuffix("]"))
        if found is None:
            raise ToolFailure(f"there is no document {document[:60]!r}; search shows ids in brackets")
        pages = parts_of(found.text, self.page) or [""]
        if not 1 <= page <= len(pages):
            raise ToolFailure(f"page must be from 1 to {len(pages)}, not {page}")
        head = f"{found.title}\n" if found.title and page == 1 else ""
        foot = f"\n(page {page} of {len(pages)})" if len(pages) > 1 else ""
        return f"{head}{pages[page - 1]}{foot}"


def parts_of(text: str, size: int) -> list[str]:
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
    return pages
