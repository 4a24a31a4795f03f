"""Documents of one's own, or the Factbook, with questions about them: what ``lookup`` asks instead of inventing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rehearsal.environments.base import SPLITS
from rehearsal.environments.corpus import LINES, Document, read_corpus
from rehearsal.environments.factbook import is_factbook, read_factbook
from rehearsal.environments.lookup_world import Question
from rehearsal.environments.splits import content_split
from rehearsal.errors import RecipeError, RehearsalError
from rehearsal.rewards.answers import prompt_key, reference_texts
from rehearsal.rewards.tasks import load_tasks
from rehearsal.rewards.verifier import Task, VerificationError
from rehearsal.texts import suffix_of


@dataclass(frozen=True)
class Library:
    """What there is to read and to ask, by split.

    Attributes:
        documents: of the Factbook those of the split's own countries, else the same ones in every split.
        questions: no two splits have one in common.
    """

    documents: Mapping[str, tuple[Document, ...]]
    questions: Mapping[str, tuple[Question, ...]]


@lru_cache(maxsize=4)
def read_library(documents: str, questions: str | None = None) -> Library:
    """A library from files; read once for all environments of a process.

    Args:
        documents: a folder of .txt, .md and .jsonl files, or a file of JSON lines, as
            :func:`rehearsal.environments.corpus.read_corpus` takes them; or the file of the Factbook, or its folder.
        questions: a file of JSON lines with "question", "answer" (a text or a list of right ones) and, if it is known,
            "documents" (ids or titles of those that lead to the answer). None where the documents are the Factbook,
            whose fields are asked for.

    Raises:
        RecipeError: for anything that is not there or cannot be used.
    """
    path = Path(documents).expanduser()
    if not path.exists():
        raise RecipeError(f"There is no file or folder {documents}; documents must name one to look things up in.")
    try:
        file = _factbook_in(path)
        if questions is None:
            if file is None:
                raise RecipeError(
                    f"{documents} is not the Factbook, which brings its questions: name a file of them in questions."
                )
            return _of_factbook(file)
        asked = load_tasks(questions, prompt="question", reference="answer")
        if file is None:
            found = tuple(read_corpus(path, without=questions))
        else:
            found = tuple(document for country in read_factbook(file) for document in country.documents)
        return _of_questions(found, asked)
    except RecipeError:
        raise
    except (RehearsalError, OSError, UnicodeDecodeError) as problem:
        raise RecipeError(f"The library {documents} cannot be used: {problem}") from problem


def _factbook_in(path: Path) -> Path | None:
    """The file of the Factbook at a path; None for other documents."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    files = [file for file in files if file.is_file() and suffix_of(file) == LINES]
    return next((file for file in files if is_factbook(file)), None)


def _of_factbook(file: Path) -> Library:
    countries = {split: [one for one in read_factbook(file) if one.split == split] for split in SPLITS}
    return Library(
        {split: tuple(document for one in own for document in one.documents) for split, own in countries.items()},
        {split: tuple(question for one in own for question in one.questions) for split, own in countries.items()},
    )


def _of_questions(documents: Sequence[Document], asked: Sequence[Task]) -> Library:
    names = {name for one in documents for name in (one.key, one.title) if name}
    dealt: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for task in asked:
        question = _question(task, names)
        # Questions that begin with one document are of one split, so that none of its answers is learnt from another.
        about = question.documents[0] if question.documents else prompt_key(question.text)
        dealt[content_split(about)].append(question)
    return Library(
        dict.fromkeys(SPLITS, tuple(documents)), {split: tuple(questions) for split, questions in dealt.items()}
    )


def _question(task: Task, names: set[str]) -> Question:
    told = f"The question {task.prompt[:60]!r}"
    try:
        answer, *others = reference_texts(task)
    except VerificationError as problem:
        raise RecipeError(f"{told} needs an answer that is a text or a list of texts.") from problem
    if not all(text.strip() for text in (answer, *others)):
        raise RecipeError(f"{told} has an empty answer.")
    read: Any = task.data.get("documents") or ()
    if not isinstance(read, list | tuple) or not all(isinstance(name, str) for name in read):
        raise RecipeError(f"{told} names its documents as something else than a list of ids or titles.")
    missing = next((name for name in read if name not in names), None)
    if missing is not None:
        raise RecipeError(f"{told} names the document {missing!r}, which is not there.")
    return Question(task.prompt, answer, tuple(read), also=tuple(others))
