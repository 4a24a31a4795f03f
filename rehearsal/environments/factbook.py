"""The World Factbook as documents and questions about countries.

It is read from one file of JSON lines (github.com/factbook/factbook.json, one country a line): ``code``, ``region`` and
``data``, in which sections hold fields and fields hold texts.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal.environments.corpus import Document
from rehearsal.environments.lookup_world import Question
from rehearsal.environments.splits import content_split
from rehearsal.errors import RecipeError
from rehearsal.texts import open_text

_TAG = re.compile(r"<[^>]*>")
_LONGEST_NAME = 60
_NUMBER = r"[1-9][\d,]*"

_FIELDS: tuple[tuple[str, str, tuple[str, ...], re.Pattern[str]], ...] = (
    ("capital", "What is the capital of {one}?", ("Government", "Capital", "name"),
     re.compile(r"([^\W\d_][^\d;,(]{1,39})")),
    ("government", "Which type of government does {one} have?", ("Government", "Government type"),
     re.compile(r"([a-z][a-z -]{1,59})")),
    ("independence", "In which year did {one} become independent?", ("Government", "Independence"),
     re.compile(r"(?:\d{1,2} [A-Z][a-z]+ )?(\d{4}) \(from [^;()\d]*\)")),
    ("internet code", "What is the internet country code of {one}?", ("Communications", "Internet country code"),
     re.compile(r"(\.[a-z]{2})")),
    ("highest point", "What is the highest point of {one}?", ("Geography", "Elevation", "highest point"),
     re.compile(r"(?!unnamed)([^\W\d_][^\d;,(]{1,39}?) [\d,]+ m")),
    ("coastline", "How many kilometres long is the coastline of {one}?", ("Geography", "Coastline"),
     re.compile(rf"({_NUMBER}) km")),
    ("borders", "How many kilometres long are all land borders of {one} together?",
     ("Geography", "Land boundaries", "total"), re.compile(rf"({_NUMBER}) km")),
    ("area", "How many square kilometres does {one} have in all?", ("Geography", "Area", "total"),
     re.compile(rf"({_NUMBER}) sq km")),
)  # fmt: skip
"""What is asked of a country: the name of the relation, the question, where its answer stands, and what a text must be
to be a short answer that leaves no doubt: those with several values, remarks or decimals are not asked for."""


@dataclass(frozen=True)
class Country:
    """A country, or another territory with an entry of its own.

    Attributes:
        code: two letters.
        name: its short name, or its long one if it has no other.
        documents: one for each section; their titles begin with the name.
        questions: with answers that stand in these documents.
    """

    code: str
    name: str
    documents: tuple[Document, ...]
    questions: tuple[Question, ...]

    @property
    def split(self) -> str:
        """The split that it belongs to, with all of its documents and questions."""
        return content_split(f"factbook {self.code}")


def is_factbook(file: Path) -> bool:
    """Whether the first line of a file is a country.

    Raises:
        OSError, UnicodeDecodeError: for a file that cannot be read.
    """
    with open_text(file) as lines:
        try:
            row = json.loads(next(lines, ""))
        except ValueError:
            return False
    return isinstance(row, dict) and isinstance(row.get("data"), dict) and "code" in row and "region" in row


def read_factbook(file: Path) -> list[Country]:
    """All countries; entries without a name, such as oceans, and those whose name is a list are left out.

    Raises:
        RecipeError: for a line that is no country.
        OSError, UnicodeDecodeError: for a file that cannot be read.
    """
    countries = []
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                country = _country(str(row["code"]), row["data"])
            except (ValueError, KeyError, TypeError, AttributeError) as problem:
                raise RecipeError(
                    f"Line {number} of {file} is no country of the Factbook, with code and data."
                ) from problem
            if country is not None:
                countries.append(country)
    return countries


def _country(code: str, data: Mapping[str, Mapping[str, Any]]) -> Country | None:
    names = data.get("Government", {}).get("Country name", {})
    name = next(
        (
            text
            for form in ("short", "long")
            if (text := _text(names.get(f"conventional {form} form"))) not in ("", "none")
        ),
        "",
    )
    if not name or len(name) > _LONGEST_NAME:
        return None
    titles = {section: f"{name}: {section}" for section in data}
    documents = tuple(
        Document(f"{code}/{section}", titles[section], "\n".join(_lines(fields))) for section, fields in data.items()
    )
    questions = []
    for relation, asked, path, pattern in _FIELDS:
        found = pattern.fullmatch(_at(data, path))
        if found is not None:
            questions.append(Question(asked.format(one=name), found[1].strip(), (titles[path[0]],), (relation,)))
    return Country(code, name, documents, tuple(questions))


def _at(data: Any, path: tuple[str, ...]) -> str:
    """The text of a field; "" if there is none."""
    for name in path:
        if not isinstance(data, Mapping):
            return ""
        # Some names of fields end in a blank.
        data = data.get(name, data.get(f"{name} "))
    return _text(data)


def _text(field: Any) -> str:
    text = field.get("text", "") if isinstance(field, Mapping) else field
    return _plain(text) if isinstance(text, str) else ""


def _plain(text: str) -> str:
    """Without mark-up."""
    return " ".join(html.unescape(_TAG.sub(" ", text)).split())


def _lines(field: Any, names: tuple[str, ...] = ()) -> Iterator[str]:
    """A section line by line: what it is about, and what is said of it."""
    if isinstance(field, Mapping):
        for name, inner in field.items():
            yield from _lines(inner, names if name == "text" else (*names, name.strip()))
    elif text := _plain(str(field)):
        yield f"{' - '.join(names)}: {text}"
