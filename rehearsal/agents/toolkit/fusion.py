"""One ranking out of several, and a corpus that is searched by words and by meaning at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rehearsal.agents.toolkit.dense import DenseIndex
from rehearsal.environments.corpus import Corpus, Document, Hit
from rehearsal.texts import clean_text

DEPTH = 100
"""Documents of each ranking that are joined, at least."""


def reciprocal_rank_fusion(rankings: Sequence[Sequence[int]], k: int = 60) -> list[tuple[int, float]]:
    """Join rankings by the sum of 1 / (k + rank) over those that hold a document, ranks counted from 1.

    Equation 1 of Cormack, Clarke and Buettcher, "Reciprocal rank fusion outperforms Condorcet and individual rank
    learning methods" (SIGIR 2009), who use k = 60.

    Args:
        rankings: of documents by number, best first, none twice in one ranking.
        k: how little the first ranks count more than later ones.

    Returns:
        Documents with their sums, best first; of equal ones the smaller number first.
    """
    terms: dict[int, list[float]] = {}
    for ranking in rankings:
        for rank, number in enumerate(ranking, 1):
            terms.setdefault(number, []).append(1.0 / (k + rank))
    # A plain sum would depend on the order of the rankings in its last digit, which would decide between equals.
    sums = {number: math.fsum(parts) for number, parts in terms.items()}
    return sorted(sums.items(), key=lambda item: (-item[1], item[0]))


class FusedCorpus:
    """A corpus whose documents are found by embeddings, alone or joined with BM25. Threads may share it.

    A snippet shows how the best passage of a document begins. In a joined ranking, that of a document which BM25 ranks
    too shows the words of the query in it.

    Args:
        corpus: of documents.
        index: of the same documents.
        hybrid: whether to join both rankings.
    """

    def __init__(self, corpus: Corpus, index: DenseIndex, hybrid: bool = True) -> None:
        self.corpus = corpus
        self.index = index
        self.hybrid = hybrid

    def search(self, query: str, count: int = 5, words: int = 24) -> list[Hit]:
        """The documents that fit a query best, best first; none for a query without anything in it.

        Args:
            query: what to look for.
            count: how many at most.
            words: of a snippet, up to 64.
        """
        query = clean_text(query).strip()
        if not query:
            return []
        depth = max(count, DEPTH) if self.hybrid else count
        near = {match.number: match for match in self.index.search(query, depth)}
        by_words: dict[int, Hit] = {}
        ranked = [(number, match.cosine) for number, match in near.items()]
        if self.hybrid:
            by_words = {self.index.number_of[hit.key]: hit for hit in self.corpus.search(query, depth, words)}
            ranked = reciprocal_rank_fusion([list(by_words), list(near)])
        hits = []
        for number, score in ranked[:count]:
            hit = by_words.get(number)
            key, title = self.index.names[number]
            snippet = hit.snippet if hit is not None else near[number].beginning(words)
            hits.append(Hit(key, title, snippet, score))
        return hits

    def get(self, key: str) -> Document | None:
        """As :meth:`~rehearsal.environments.corpus.Corpus.get`."""
        return self.corpus.get(key)
