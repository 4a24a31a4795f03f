"""Lookup: questions that take one to three documents of a corpus to answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from rehearsal.environments import corpus
from rehearsal.environments.episode import EpisodeEnv, whole_number
from rehearsal.environments.lookup_world import (
    MAX_HOPS,
    MAX_PEOPLE,
    Document,
    Question,
    lookup_questions,
    lookup_world,
)
from rehearsal.environments.reading import Reader
from rehearsal.rewards.questions import exact_match


class Lookup(EpisodeEnv):
    """Answer a question about people, firms and places that nobody has heard of.

    Everything that can be asked is written in a corpus of short documents, one for each person, firm, town and region;
    ``documents`` gives it, and an agent has ``search`` and ``open`` to read it with. All of it is made from a seed, so
    nothing can be known beforehand, and each split has a world of its own with names of its own. A question takes as
    many documents as it has hops: each names the next.

    The reward is 1 for the right answer and 0 for any other, which ends the episode either way. Answers are compared
    as SQuAD compares them, without regard to case, punctuation and articles.

    Args:
        hops: documents that a question takes, 1 to 3.
        world: the seed of everything.
        people: how many there are, 12 to 500; with the firms, towns and regions there are nearly twice as many
            documents.
        turns: turns of an episode: what searching may take, and the answer.

    Raises:
        RecipeError: for a parameter out of its range.
    """

    name = "lookup"
    max_turns = 8
    max_actions_per_turn = 1

    def __init__(self, hops: int = 2, world: int = 0, people: int = 120, turns: int = 8) -> None:
        super().__init__(max_steps=1)
        self.hops = whole_number("hops", hops, 1, MAX_HOPS)
        self.world = whole_number("world", world, 0, 2**32 - 1)
        self.people = whole_number("people", people, 12, MAX_PEOPLE)
        self.max_turns = whole_number("turns", turns, 1, 64)
        self._question = Question("", "", ())
        self._answer = ""

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        return (
            "Answer the question. All that it takes is written in documents about people, firms, towns and regions. "
            "The action is the answer alone: a name, a word or a year."
        )

    def documents(self, split: str | None = None) -> tuple[Document, ...]:
        """The corpus of a split; of the present episode's if none is named."""
        return lookup_world(self.world, split or self._split, self.people).documents

    @property
    def tools(self) -> Sequence[Callable[..., Any]]:
        """``search`` and ``open``, over the documents of the present split."""
        reader = _reader(self.world, self._split, self.people)
        return [reader.search, reader.open]

    def task_count(self, split: str) -> int:
        """All questions that can be asked about the split's world."""
        return len(lookup_questions(self.world, split, self.people, self.hops))

    def _draw(self, split: str) -> str:
        questions = lookup_questions(self.world, split, self.people, self.hops)
        self._question = self._pick(questions)
        self._answer = ""
        return self._question.text

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        self._answer = action
        right = exact_match(action, self._question.answer)
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
