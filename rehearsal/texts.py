"""Text: what of it can be written down, and files of it, compressed or not."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

COMPRESSED = ".gz"


def clean_text(text: str) -> str:
    """With a question mark for each half of a surrogate pair, which no file and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def suffix_of(path: Path) -> str:
    """The suffix of a file, that of ``tasks.jsonl.gz`` being ``.jsonl``."""
    return Path(path.stem).suffix if path.suffix == COMPRESSED else path.suffix


def stem_of(path: Path) -> str:
    """The name of a file without its suffix, that of ``tasks.jsonl.gz`` being ``tasks``."""
    return Path(path.stem).stem if path.suffix == COMPRESSED else path.stem


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file of text in UTF-8; one that ends in ``.gz`` is unpacked as it is read.

    Raises:
        OSError: for a file that cannot be opened, and for compressed data that is damaged or cut off.
        UnicodeDecodeError: while it is read, for anything else than UTF-8.
    """
    compressed = path.suffix == COMPRESSED
    with gzip.open(path, "rt", encoding="utf-8") if compressed else path.open(encoding="utf-8") as file:
        try:
            yield file
        except (EOFError, zlib.error) as problem:
            raise gzip.BadGzipFile("the compressed data is damaged or cut off") from problem


def find_file(path: Path) -> Path | None:
    """The file of this name, or the one with ``.gz`` behind it; None if there is neither."""
    return next((file for file in (path, path.with_name(path.name + COMPRESSED)) if file.is_file()), None)
