"""A world of invented people, firms and places, and what is written about it: made from a seed, known to nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rehearsal.environments.base import SPLITS
from rehearsal.environments.splits import content_split

_HEADS = (
    "Bal", "Cor", "Dun", "Fer", "Gal", "Hol", "Jar", "Kel", "Lor", "Mar", "Nor", "Pel", "Ros", "Sel", "Tor", "Vel",
    "Wen", "Yar", "Zan", "Bri", "Cas", "Dre", "Fal", "Gri", "Hes", "Kan", "Lin", "Mel", "Nav", "Oster",
)  # fmt: skip
_MIDDLES = ("a", "e", "i", "o", "u", "an", "en", "in", "or", "al", "el", "ar")
_TOWNS = ("ton", "ville", "burg", "mouth", "stead", "ford")
_REGIONS = ("land", "shire", "mark", "ia")
_FIRMS = ("ex", "tec", "co", "works", "lab", "ware")
_LAST = ("sen", "man", "ski", "berg", "dottir", "ez")
_FIRST = (
    "Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "Jana", "Kai", "Lea", "Mika", "Nils", "Olga",
    "Pia", "Rafa", "Sara", "Timo", "Uma", "Vera", "Willa", "Xena", "Yuri", "Zoe",
)  # fmt: skip
_PRODUCTS = ("lamps", "boats", "clocks", "paint", "gloves", "bread", "drones", "tents", "violins", "pumps", "maps")
_JOBS = ("mason", "nurse", "driver", "clerk", "painter", "chemist", "tailor", "pilot")

SENTENCES: dict[str, tuple[str, ...]] = {
    "born in": ("{one} was born in {other}.", "{one} grew up in {other}, where {one} was born."),
    "works for": ("{one} works for {other}.", "{one} has a post at {other}."),
    "works as": ("By trade {one} is a {other}.", "{one} works as a {other}."),
    "based in": ("{one} has its seat in {other}.", "The offices of {one} are in {other}."),
    "makes": ("{one} makes {other}.", "{one} is known for its {other}."),
    "founded in": ("{one} was founded in {other}.", "{one} opened its doors in {other}."),
    "founded by": ("{other} founded {one}.", "The founder of {one} is {other}."),
    "lies in": ("{one} is a town in {other}.", "{one} lies in {other}."),
    "chief town": ("The chief town of {one} is {other}.", "{other} is the chief town of {one}."),
}
"""What is written of each relation, in several wordings; ``one`` is whom the document is about."""

_ASKED: dict[tuple[str, ...], str] = {
    ("born in",): "In which town was {one} born?",
    ("works for",): "Which firm does {one} work for?",
    ("works as",): "What is the trade of {one}?",
    ("based in",): "In which town is the seat of {one}?",
    ("makes",): "What does {one} make?",
    ("founded in",): "In which year was {one} founded?",
    ("founded by",): "Who founded {one}?",
    ("lies in",): "In which region is the town of {one}?",
    ("chief town",): "What is the chief town of {one}?",
    ("works for", "based in"): "In which town is the seat of the firm that {one} works for?",
    ("works for", "makes"): "What does the firm that {one} works for make?",
    ("works for", "founded by"): "Who founded the firm that {one} works for?",
    ("works for", "founded in"): "In which year was the firm founded that {one} works for?",
    ("born in", "lies in"): "In which region is the town where {one} was born?",
    ("founded by", "born in"): "In which town was the founder of {one} born?",
    ("founded by", "works as"): "What is the trade of the founder of {one}?",
    ("based in", "lies in"): "In which region is the seat of {one}?",
    ("works for", "based in", "lies in"): "In which region is the seat of the firm that {one} works for?",
    ("works for", "founded by", "born in"): "In which town was the founder of the firm born that {one} works for?",
    ("founded by", "born in", "lies in"): "In which region was the founder of {one} born?",
    ("born in", "lies in", "chief town"): "What is the chief town of the region where {one} was born?",
}
"""Questions by the relations that lead to their answer."""

MAX_HOPS = 3
MAX_PEOPLE = 500
"""More firms than these people need have no names left that are no other split's."""


@dataclass(frozen=True)
class Document:
    """What is written about somebody or something.

    Attributes:
        title: whom or what it is about; no other document has it.
        text: a few sentences.
    """

    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        text: the question.
        answer: a name, a word or a year.
        documents: titles of the documents that lead to the answer, in order.
        relations: what each of them is read for, as in ``SENTENCES``.
        also: other right answers.
    """

    text: str
    answer: str
    documents: tuple[str, ...]
    relations: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class LookupWorld:
    """Everything there is.

    Attributes:
        documents: about every person, firm, town and region.
        facts: by whom they are about and relation, what is the case.
    """

    documents: tuple[Document, ...]
    facts: dict[tuple[str, str], str]


@lru_cache(maxsize=16)
def lookup_world(world: int, split: str, people: int) -> LookupWorld:
    """The world of a seed and a split.

    Each split has a world of its own, with names that no other split has in any world: what a policy learns by heart in
    training is of no use in a test.

    Args:
        world: a seed.
        split: one of ``SPLITS``.
        people: how many, at most ``MAX_PEOPLE``; for three people there is a firm, for four a town.
    """
    rng = np.random.default_rng([world, SPLITS.index(split), people])
    used: set[str] = set()

    def names(count: int, tails: Sequence[str], first: Sequence[str] = ()) -> list[str]:
        made: list[str] = []
        while len(made) < count:
            root = _one(rng, _HEADS) + _one(rng, _MIDDLES) + _one(rng, tails)
            name = f"{_one(rng, first)} {root}" if first else root
            if content_split(root) == split and name not in used:
                used.add(name)
                made.append(name)
        return made

    regions = names(max(2, people // 12), _REGIONS)
    towns = names(max(4, people // 4), _TOWNS)
    firms = names(max(4, people // 3), _FIRMS)
    persons = names(people, _LAST, _FIRST)
    facts: dict[tuple[str, str], str] = {}
    for number, town in enumerate(towns):
        # Every region has a town, which is its chief one.
        region = regions[number] if number < len(regions) else _one(rng, regions)
        facts[town, "lies in"] = region
        facts.setdefault((region, "chief town"), town)
    for firm in firms:
        facts[firm, "based in"] = _one(rng, towns)
        facts[firm, "makes"] = _one(rng, _PRODUCTS)
        facts[firm, "founded in"] = str(int(rng.integers(1850, 2021)))
        facts[firm, "founded by"] = _one(rng, persons)
    for person in persons:
        facts[person, "born in"] = _one(rng, towns)
        facts[person, "works for"] = _one(rng, firms)
        facts[person, "works as"] = _one(rng, _JOBS)
    told: dict[str, list[str]] = {}
    for (one, relation), other in facts.items():
        told.setdefault(one, []).append(_one(rng, SENTENCES[relation]).format(one=one, other=other))
    documents = [
        Document(title, " ".join(sentences[place] for place in rng.permutation(len(sentences))))
        for title, sentences in told.items()
    ]
    return LookupWorld(tuple(documents), facts)


@lru_cache(maxsize=16)
def lookup_questions(world: int, split: str, people: int, hops: int) -> tuple[Question, ...]:
    """All questions about a world that take so many documents to answer; see :func:`lookup_world`."""
    facts = lookup_world(world, split, people).facts
    found = []
    for path, asked in _ASKED.items():
        if len(path) != hops:
            continue
        for one, relation in facts:
            if relation == path[0]:
                titles = [one]
                for step in path:
                    titles.append(facts[titles[-1], step])
                found.append(Question(asked.format(one=one), titles[-1], tuple(titles[:-1]), path))
    return tuple(found)


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
