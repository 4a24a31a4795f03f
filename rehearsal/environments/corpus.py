"""A local corpus of documents with full-text search: BM25 from SQLite's FTS5, in memory or in a file, no server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal.errors import ToolError
from rehearsal.texts import clean_text, open_text, stem_of, suffix_of

SUFFIXES = (".txt", ".md")
"""Files of a folder that are documents."""
LINES = ".jsonl"
"""Files of a folder whose lines are documents."""

_MAX_TERMS = 32
_TITLE_WEIGHT = 2.0
_WORD = re.compile(r"\w+")
_VERSION = "1"


@dataclass(frozen=True)
class Document:
    """Attributes:
    key: names it, and no other one.
    title: in a line; "" if it has none.
    text: all of it.
    """

    key: str
    title: str
    text: str


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        key, title: of the document.
        snippet: the words around what was looked for.
        score: BM25, or what else ranks; higher is better, comparable within one query.
    """

    key: str
    title: str
    snippet: str
    score: float


class Corpus:
    """Documents that are searched and read, and never changed; any number of threads may do so at once.

    Ranking is BM25 (k1 = 1.2, b = 0.75, as FTS5 has it) over stemmed words, words of the title counting twice; of equal
    documents the earlier one comes first, so the same query always gets the same answer.

    Args:
        documents: in the order in which equal ones are ranked.
        path: of a file for the index; None for memory. A file that was made of the same documents is used again.

    Raises:
        ToolError: for two documents of one key, no documents, or a file that cannot be written.
    """

    def __init__(self, documents: Iterable[Document], path: str | Path | None = None) -> None:
        found = [Document(*map(clean_text, (one.key, one.title, one.text))) for one in documents]
        if not found:
            raise ToolError("The corpus has no documents; give it at least one.")
        keys: set[str] = set()
        for document in found:
            if document.key in keys:
                raise ToolError(f"Two documents of the corpus have the id {document.key!r}; give them different ones.")
            keys.add(document.key)
        self._lock = threading.Lock()
        try:
            self._connection = _in_memory(found) if path is None else _in_file(found, Path(path))
        except sqlite3.Error as error:
            raise ToolError(f"The index of the corpus cannot be made: {error}.") from error

    def __len__(self) -> int:
        return int(self._rows("SELECT count(*) FROM documents")[0][0])

    def search(self, query: str, count: int = 5, words: int = 24) -> list[Hit]:
        """The documents that fit a query best; those with any of its words, best first.

        Args:
            query: words; everything else in it is ignored, FTS5's operators too.
            count: how many at most.
            words: of a snippet, up to 64.
        """
        # In lower case only to tell which are the same; FTS5 folds them as it folded the documents, "ß" not to "ss".
        terms = list(dict.fromkeys(word.lower() for word in _WORD.findall(clean_text(query))))[:_MAX_TERMS]
        if not terms:
            return []
        rows = self._rows(
            f"SELECT key, title, snippet(documents, 2, '', '', '...', {int(words)}), "
            f"-bm25(documents, 0.0, {_TITLE_WEIGHT}, 1.0) AS score FROM documents WHERE documents MATCH ? "
            "ORDER BY score DESC, rowid LIMIT ?",
            (" OR ".join(f'"{term}"' for term in terms), count),
        )
        return [Hit(key, title, " ".join(snippet.split()), score) for key, title, snippet, score in rows]

    def get(self, key: str) -> Document | None:
        """The document of a key, or of a title that no other one has; None if there is none."""
        wanted = clean_text(key.strip())
        rows = self._rows("SELECT key, title, text FROM documents WHERE rowid = "
                          "(SELECT number FROM keys WHERE key = ?)", (wanted,))  # fmt: skip
        if not rows and wanted:
            rows = self._rows("SELECT key, title, text FROM documents WHERE rowid IN "
                              "(SELECT number FROM keys WHERE title = ? LIMIT 2)", (wanted.casefold(),))  # fmt: skip
        return Document(*rows[0]) if len(rows) == 1 else None

    def documents(self) -> list[Document]:
        """All of them, in the order in which equal ones are ranked."""
        return [Document(*row) for row in self._rows("SELECT key, title, text FROM documents ORDER BY rowid")]

    def close(self) -> None:
        """Close the index."""
        with self._lock:
            self._connection.close()

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:  # a query takes well under a millisecond for thousands of documents
            return self._connection.execute(statement, values).fetchall()


def read_corpus(
    source: str | Path | Sequence[Mapping[str, Any]], without: str | Path | None = None
) -> list[Document]:  # fmt: skip
    """Documents from where they are.

    Args:
        source: a file of JSON lines with "text" and, if there are any, "id" and "title"; a folder, whose .txt and .md
            files are documents, and the lines of its .jsonl files too; or a list of mappings as in the lines. Files may
            be compressed, with .gz behind their name.
        without: a file of the folder that holds no documents.

    Raises:
        ToolError: for anything that cannot be read.
    """
    if not isinstance(source, str | Path):
        return [_document(entry, f"Document {number}", number) for number, entry in enumerate(source, 1)]
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return list(_of_folder(path, None if without is None else Path(without).expanduser().resolve()))
        return list(_of_lines(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"The corpus {path} cannot be read: {error}.") from error


def _of_folder(folder: Path, without: Path | None) -> Iterator[Document]:
    suffixes = (*SUFFIXES, LINES)
    files = sorted(file for file in folder.rglob("*") if suffix_of(file) in suffixes and file.is_file())
    files = [file for file in files if file.resolve() != without]
    if not files:
        raise ToolError(f"The folder {folder} has no {' or '.join(suffixes)} files.")
    for file in files:
        name = file.relative_to(folder).as_posix()
        if suffix_of(file) == LINES:
            yield from _of_lines(file, f"{name}:")
            continue
        with open_text(file) as text:
            yield Document(name, stem_of(file), text.read())


def _of_lines(path: Path, lead: str = "") -> Iterator[Document]:
    """The documents of a file; those without an id are called by their number, behind ``lead``."""
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ToolError(f"Line {number} of {path} is no JSON: {error}.") from error
            yield _document(entry, f"Line {number} of {path}", f"{lead}{number}")


def _document(entry: Any, where: str, number: int | str) -> Document:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
        raise ToolError(f'{where} must have a "text" that is a string.')
    key, title = entry.get("id"), entry.get("title")
    return Document(str(number if key is None else key), "" if title is None else str(title), entry["text"])


def _fill(connection: sqlite3.Connection, documents: Sequence[Document]) -> None:
    connection.execute(
        "CREATE VIRTUAL TABLE documents USING fts5(key UNINDEXED, title, text, tokenize='porter unicode61')"
    )
    # Looking up a key in a full-text table would read all of it.
    connection.execute("CREATE TABLE keys (number INTEGER PRIMARY KEY, key TEXT UNIQUE, title TEXT)")
    connection.executemany(
        "INSERT INTO documents (rowid, key, title, text) VALUES (?, ?, ?, ?)",
        ((number, one.key, one.title, one.text) for number, one in enumerate(documents, 1)),
    )
    connection.executemany(
        "INSERT INTO keys VALUES (?, ?, ?)",
        ((number, one.key, one.title.casefold()) for number, one in enumerate(documents, 1)),
    )
    connection.execute("CREATE INDEX titles ON keys (title)")
    connection.commit()


def _in_memory(documents: Sequence[Document]) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    _fill(connection, documents)
    connection.execute("PRAGMA query_only = ON")
    return connection


def _in_file(documents: Sequence[Document], path: Path) -> sqlite3.Connection:
    digest = hashlib.sha256(_VERSION.encode())
    for one in documents:
        for text in (one.key, one.title, one.text):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    name = digest.hexdigest()
    if path.is_file() and _name_of(path) == name:
        return _read_only(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        connection = sqlite3.connect(aside)
        try:
            _fill(connection, documents)
            connection.execute("CREATE TABLE made_of (name TEXT)")
            connection.execute("INSERT INTO made_of VALUES (?)", (name,))
            connection.commit()
        finally:
            connection.close()
        # At once: another process that reads the file sees the old index or the new one.
        os.replace(aside, path)
    except OSError as error:
        raise ToolError(f"The index {path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return _read_only(path)


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)


def _name_of(path: Path) -> str:
    try:
        connection = _read_only(path)
        try:
            return str(connection.execute("SELECT name FROM made_of").fetchone()[0])
        finally:
            connection.close()
    except (sqlite3.Error, TypeError):
        return ""  # something else, or damaged: it is made anew
