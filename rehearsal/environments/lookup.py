"""Lookup: questions that take one to three documents of a corpus to answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from rehearsal.environments import corpus
from rehearsal.environments.episode import EpisodeEnv, whole_number
from rehearsal.environments.library import read_library
from rehearsal.environments.lookup_world import (
    MAX_HOPS,
    MAX_PEOPLE,
    Document,
    Question,
    lookup_questions,
    lookup_world,
)
from rehearsal.environments.reading import Reader
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.rewards.questions import exact_match

_INVENTED = {"hops": 2, "world": 0, "people": 120}


class Lookup(EpisodeEnv):
    """Answer a question about people, firms and places that nobody has heard of, or about documents of your own.

    Everything that can be asked is written in a corpus of short documents, one for each person, firm, town and region;
    ``documents`` gives it, and an agent has ``search`` and ``open`` to read it with. All of it is made from a seed, so
    nothing can be known beforehand, and each split has a world of its own with names of its own. A question takes as
    many documents as it has hops: each names the next.

    The reward is 1 for the right answer and 0 for any other, which ends the episode either way. Answers are compared
    as SQuAD compares them, without regard to case, punctuation and articles.

    With ``documents`` there is no invented world: questions are about a folder of texts, or about the countries of the
    World Factbook; see :func:`rehearsal.environments.library.read_library`. Countries are of one split each, with their
    documents; of other documents every split has all, and its own questions.

    Args:
        hops: documents that a question takes, 1 to 3.
        world: the seed of everything.
        people: how many there are, 12 to 500; with the firms, towns and regions there are nearly twice as many
            documents.
        turns: turns of an episode: what searching may take, and the answer.
        documents: a folder or a file of documents, or the Factbook.
        questions: a file of questions about them; the Factbook brings its own.

    Raises:
        RecipeError: for a parameter out of its range, files that cannot be used, and parameters of an invented world
            beside documents.
    """

    name = "lookup"
    max_turns = 8
    max_actions_per_turn = 1

    def __init__(
        self, hops: int = 2, world: int = 0, people: int = 120, turns: int = 8, documents: str | None = None,
        questions: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(max_steps=1)
        self.hops = whole_number("hops", hops, 1, MAX_HOPS)
        self.world = whole_number("world", world, 0, 2**32 - 1)
        self.people = whole_number("people", people, 12, MAX_PEOPLE)
        self.max_turns = whole_number("turns", turns, 1, 64)
        self._question = Question("", "", ())
        self._answer = ""
        if documents is None and questions is not None:
            raise RecipeError("questions are about documents; name a folder or a file of them in documents.")
        if documents is not None:
            given = {"hops": hops, "world": world, "people": people}
            for name, value in given.items():
                if value != _INVENTED[name]:
                    also = ", also in curriculum.stages (of the recipe lookup, for one)" if name == "hops" else ""
                    raise RecipeError(f"With documents of your own, {name} has no meaning; leave it out{also}.")
        self._files = None if documents is None else (str(documents), None if questions is None else str(questions))
        self._library = None if self._files is None else read_library(*self._files)

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        if self._library is not None:
            return (
                "Answer the question. All that it takes is written in documents. The action is the answer alone: a "
                "name, a few words, or a number without its unit."
            )
        return (
            "Answer the question. All that it takes is written in documents about people, firms, towns and regions. "
            "The action is the answer alone: a name, a word or a year."
        )

    def documents(self, split: str | None = None) -> Sequence[Document | corpus.Document]:
        """The corpus of a split; of the present episode's if none is named."""
        if self._library is not None:
            return self._library.documents[split or self._split]
        return lookup_world(self.world, split or self._split, self.people).documents

    def _questions(self, split: str) -> Sequence[Question]:
        if self._library is not None:
            return self._library.questions[split]
        return lookup_questions(self.world, split, self.people, self.hops)

    @property
    def tools(self) -> Sequence[Callable[..., Any]]:
        """``search`` and ``open``, over the documents of the present split."""
        if self._files is not None:
            reader = _library_reader(*self._files, self._split)
        else:
            reader = _reader(self.world, self._split, self.people)
        return [reader.search, reader.open]

    def task_count(self, split: str) -> int:
        """All questions that can be asked in the split."""
        return len(self._questions(split))

    def _draw(self, split: str) -> str:
        questions = self._questions(split)
        if not questions:
            raise EnvironmentFault(f"None of the questions belongs to the {split} split: there are too few of them.")
        self._question = self._pick(questions)
        self._answer = ""
        return self._question.text

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        self._answer = action
        right = any(exact_match(action, answer) for answer in (self._question.answer, *self._question.also))
        return float(right), True, right, True

    def _observation(self) -> str:
        if self._over:
            return "right" if self._success else "wrong"
        return self._question.text

    def _state(self) -> str:
        return f"{self._question.text} {self._answer}".strip()

    def oracle(self) -> list[str]:
        """The answer, or nothing once one was given."""
        self._need_reset()
        return [] if self._over else [self._question.answer]

    def optimal_success(self) -> float:
        """1 before the answer; afterwards 1 or 0."""
        self._need_reset()
        return float(self._success) if self._over else 1.0

    def describe(self) -> dict[str, Any]:
        """``question``; ``documents``: the titles that lead to the answer, in order; ``relations``: what each is read
        for."""
        self._need_reset()
        asked = self._question
        return {
            "question": asked.text, "documents": list(asked.documents), "relations": list(asked.relations)
        }  # fmt: skip


@lru_cache(maxsize=16)
def _reader(world: int, split: str, people: int) -> Reader:
    """Reads the corpus of a world; one for all episodes, which nothing changes."""
    documents = lookup_world(world, split, people).documents
    return Reader(corpus.Corpus(corpus.Document(one.title, "", one.text) for one in documents))


@lru_cache(maxsize=8)
def _library_reader(documents: str, questions: str | None, split: str) -> Reader:
    """Reads the documents of a library; one for all episodes."""
    return Reader(corpus.Corpus(read_library(documents, questions).documents[split]))
