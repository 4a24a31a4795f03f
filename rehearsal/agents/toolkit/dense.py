"""Documents found by the cosine of embeddings: passages that an encoder takes, embedded once, searched exactly."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from rehearsal.environments.corpus import Document
from rehearsal.environments.reading import parts_of
from rehearsal.errors import ToolError
from rehearsal.models.encoder import Encoder
from rehearsal.texts import clean_text

_VERSION = "1"
_KEPT = 2
_QUERIES = 4096
_LETTERS = 12
"""Letters of a snippet for each of its words, for writing without blanks."""

_made: OrderedDict[tuple[Encoder, str], np.ndarray] = OrderedDict()
_making = threading.Lock()


@dataclass(frozen=True)
class Match:
    """A document near a query.

    Attributes:
        number: of the document, from 0 on.
        cosine: of the query and its best passage.
        passage: that one, without its title.
    """

    number: int
    cosine: float
    passage: str

    def beginning(self, words: int) -> str:
        """The first words of the passage, on a line."""
        every = self.passage.split()
        text = " ".join(every[:words])[: words * _LETTERS]
        return text if text == " ".join(every) else f"{text}..."


class DenseIndex:
    """The passages of documents with their embeddings. A document is as near to a query as the nearest of its passages
    (MaxP, Dai and Callan, arXiv:1905.09217). Never changed, so that any number of threads may search it.

    A document that an encoder cannot take at a time is cut into passages of about equal length at blanks, and its title
    goes before each of them. Passages that are equal are embedded once, so equal documents are equally near, and the
    earlier one comes first. Documents without a title and a text are not found.

    Embeddings are kept for the next index of the same passages in this process; with ``cache``, for others as well.

    Args:
        documents: with keys that differ.
        encoder: of the passages and the queries.
        query_prefix, document_prefix: what goes before each; what the encoder's folder says if None.
        cache: folder for embeddings; the names of its files stand for the tokens of all passages and for everything
            that the encoder makes of them, so it may be shared by any corpora and encoders.

    Attributes:
        names: key and title of each document.
        number_of: the place of a document by its key.

    Raises:
        ToolError: for a prefix that leaves no room for a passage, or a cache that cannot be written.
        ModelError: if the encoder fails.
    """

    def __init__(
        self, documents: Sequence[Document], encoder: Encoder, *, query_prefix: str | None = None,
        document_prefix: str | None = None, cache: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.encoder = encoder
        self.names = [(one.key, one.title) for one in documents]
        self.number_of = {one.key: number for number, one in enumerate(documents)}
        self._prefix = encoder.prefixes["query"] if query_prefix is None else query_prefix
        before = encoder.prefixes["document"] if document_prefix is None else document_prefix
        for name, prefix in (("query_prefix", self._prefix), ("document_prefix", before)):
            if (n := len(encoder.token_ids([prefix], cut=False)[0])) > encoder.max_tokens // 2:
                raise ToolError(f"{name} takes {n} of the {encoder.max_tokens} tokens of a passage; shorten it.")
        numbers, self._passages, ids = _passages(documents, encoder, before)
        place_of: dict[bytes, int] = {}
        places = [place_of.setdefault(one.tobytes(), len(place_of)) for one in ids]
        different = [np.frombuffer(content, np.int32) for content in place_of]
        self._embeddings_ND = _embeddings(different, encoder, None if cache is None else Path(cache).expanduser())
        self._place_of_P = np.asarray(places, np.int64)
        # The passages of a document stand together: where they begin, and whose they are.
        numbers_P = np.asarray(numbers, np.int64)
        self._begin_F = np.flatnonzero(np.diff(numbers_P, prepend=-1))
        self._number_F = numbers_P[self._begin_F]
        self._embedded = lru_cache(_QUERIES)(self._embed)

    def search(self, query: str, count: int) -> list[Match]:
        """The documents nearest to a query, nearest first; none for a query without tokens.

        Args:
            query: without a prefix.
            count: how many at most.

        Raises:
            ModelError: if the encoder fails.
        """
        query = clean_text(query).strip()
        vector_D = self._embedded(query) if query else None
        if vector_D is None or not len(self._begin_F):
            return []
        cosines_P = (self._embeddings_ND @ vector_D)[self._place_of_P]
        best_F = np.maximum.reduceat(cosines_P, self._begin_F)
        found = []
        for row in np.argsort(-best_F, kind="stable")[:count]:
            begin = int(self._begin_F[row])
            end = int(self._begin_F[row + 1]) if row + 1 < len(self._begin_F) else len(cosines_P)
            passage = self._passages[begin + int(np.argmax(cosines_P[begin:end]))]
            found.append(Match(int(self._number_F[row]), float(best_F[row]), passage))
        return found

    def _embed(self, query: str) -> np.ndarray | None:
        # Alone in its batch: what other episodes ask at the same time must not change its last digits.
        vector_D = self.encoder.embed([self._prefix + query])[0]
        return vector_D if vector_D.any() else None


@lru_cache(maxsize=2)
def _loaded(source: str, state: tuple[object, ...], pooling: str | None, max_tokens: int | None, batch_size: int,
            device: str, dtype: str) -> Encoder:  # fmt: skip
    return Encoder(source, pooling=pooling, max_tokens=max_tokens, batch_size=batch_size, device=device, dtype=dtype)


def shared_encoder(
    source: str | Path, *, pooling: str | None, max_tokens: int | None, batch_size: int, device: str, dtype: str
) -> Encoder:
    """An encoder as :class:`~rehearsal.models.encoder.Encoder` makes it; the one that is there already if the process
    has loaded it and the files of its folder have not changed since."""
    folder = Path(source).expanduser()
    state: tuple[object, ...] = ()
    if folder.is_dir():
        files = sorted([*folder.glob("*"), *folder.glob("*/config.json")])
        status = [(file, file.stat()) for file in files if file.is_file()]
        state = tuple((str(file.resolve()), at.st_size, at.st_mtime_ns) for file, at in status)
    return _loaded(str(source), state, pooling, max_tokens, batch_size, device, dtype)


def _passages(documents: Sequence[Document], encoder: Encoder, prefix: str) -> tuple[list[int], list[str],
                                                                                     list[np.ndarray]]:  # fmt: skip
    """Of all passages in order: the number of the document, the text without its title, and the tokens."""
    numbers: list[int] = []
    texts: list[str] = []
    found: list[np.ndarray] = []
    for number, document in enumerate(documents):
        head, text = prefix, document.text
        if document.title.strip():
            head = f"{prefix}{document.title.strip()} "
            # A title that leaves little room is read once, as the beginning of the text.
            if len(encoder.token_ids([head], cut=False)[0]) > encoder.max_tokens // 2:
                head, text = prefix, f"{document.title}\n{document.text}"
            elif not text.strip():
                head, text = prefix, document.title
        for part, ids in _cut(encoder, head, text):
            numbers.append(number)
            texts.append(part)
            found.append(ids)
    return numbers, texts, found


def _cut(encoder: Encoder, head: str, text: str) -> list[tuple[str, np.ndarray]]:
    """A text in parts that an encoder takes behind a head, with the tokens of both."""
    if not text.strip():
        return []
    ids = encoder.token_ids([head + text], cut=False)[0]
    if len(ids) <= encoder.max_tokens:
        return [(text, ids)] if len(ids) else []
    if len(text) == 1:  # a sign that is spelled out in many tokens
        return [(text, encoder.token_ids([head + text])[0])]
    taken = len(encoder.token_ids([head], cut=False)[0])
    pieces = max(2, math.ceil((len(ids) - taken) / (encoder.max_tokens - taken)))
    # Some parts have more tokens than others of the same length; those are cut again.
    return [one for part in parts_of(text, math.ceil(len(text) / pieces)) for one in _cut(encoder, head, part)]


def _embeddings(ids: Sequence[np.ndarray], encoder: Encoder, cache: Path | None) -> np.ndarray:
    """The embeddings of passages: those that this process has, those of the cache, or new ones."""
    digest = hashlib.sha256(_VERSION.encode())
    for one in ids:
        digest.update(len(one).to_bytes(8, "little") + one.tobytes())
    name = digest.hexdigest()
    with _making:  # two that make the same would take twice the memory
        made_ND = _made.get((encoder, name))
        if cache is not None:
            whole = hashlib.sha256(f"{name} {encoder.fingerprint}".encode()).hexdigest()
            made_ND = _stored(cache / f"{whole}.npy", made_ND, ids, encoder)
        elif made_ND is None:
            made_ND = encoder.embed_tokens(ids)
        _made[encoder, name] = made_ND
        _made.move_to_end((encoder, name))
        while len(_made) > _KEPT:
            _made.popitem(last=False)
    return made_ND


def _stored(file: Path, made_ND: np.ndarray | None, ids: Sequence[np.ndarray], encoder: Encoder) -> np.ndarray:
    """Embeddings that are made already, are in a file, or are made now; they are in the file afterwards."""
    if made_ND is None:
        read_ND = _read(file, (len(ids), encoder.dimension))
        if read_ND is not None:
            return read_ND
        made_ND = encoder.embed_tokens(ids)
    elif file.is_file():
        return made_ND
    _write(file, made_ND)
    return made_ND


def _read(file: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Embeddings that were written; None if there are none, or the file is damaged."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(found, np.ndarray) or found.shape != shape or found.dtype != np.float32:
        return None
    return found if np.isfinite(found).all() else None


def _write(file: Path, embeddings_ND: np.ndarray) -> None:
    aside = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as stream:
            np.save(stream, embeddings_ND, allow_pickle=False)
        # At once: another process finds nothing or all of it.
        os.replace(aside, file)
    except OSError as error:
        raise ToolError(f"The embeddings cannot be written to {file.parent}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
