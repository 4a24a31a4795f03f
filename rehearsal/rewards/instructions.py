"""Precise instruction following: the 25 types of IFEval (arXiv:2311.07911), strict and loose.

The checkers are those that lm-eval maintains (github.com/EleutherAI/lm-evaluation-harness, ``lm_eval.tasks.ifeval``).
What differs from running them there:

- Nothing is fetched. On import they would download the sentence model of NLTK ("punkt_tab"); here that is prevented,
  and the two types that need it say so where it is missing.
- An instruction whose arguments are missing is refused. The checkers would draw them at random and check against that,
  also for a letter that is none: two of the published prompts ask for "#" and "!", which they replace by a random
  letter. Here the given character is counted.
- Language detection draws random numbers; their seed is fixed, so the same text gets the same score.
- A text in which no language can be found (such as "123") is in none. The checkers count it as being in any.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

from rehearsal.errors import RewardError
from rehearsal.rewards.answers import without_thought
from rehearsal.rewards.verifier import Score, Task, VerificationError

_LIBRARIES = ("lm_eval", "nltk", "langdetect", "immutabledict")
_NEEDS_SENTENCES = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
_NEEDS_LANGUAGE = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
_importing = threading.Lock()


@dataclass(frozen=True)
class InstructionFollowing:
    """Whether a completion follows precise instructions.

    The task has them in ``data`` as IFEval's files do: ``instruction_id_list`` (such as "punctuation:no_comma") and
    ``kwargs`` (a dictionary for each). The thought is left out.

    Parts: one for each instruction, 1 or 0, by its id, with "#2" and so on where an id stands there again.

    Attributes:
        mode: ``strict``, or ``loose``: an instruction counts as followed if it is in any of eight variants of the text
            (first line, last line or both left out, with and without asterisks).
        value: ``share`` of the instructions that are followed, or ``all``: 1 if all of them are.
        nltk_data: a folder with NLTK's data, in which ``tokenizers/punkt_tab/english`` is; NLTK's usual places if None.

    Raises:
        RewardError: if a library is not installed, or for another mode or value.
        VerificationError: for unknown instructions and missing arguments, and where language data is missing.
    """

    mode: Literal["strict", "loose"] = "strict"
    value: Literal["share", "all"] = "share"
    nltk_data: str | None = None
    name: str = "ifeval"

    def __post_init__(self) -> None:
        if self.mode not in ("strict", "loose"):
            raise RewardError(f'The mode of instruction following is "strict" or "loose", not {self.mode!r}.')
        if self.value not in ("share", "all"):
            raise RewardError(f'The value of instruction following is "share" or "all", not {self.value!r}.')
        missing = [library for library in _LIBRARIES if importlib.util.find_spec(library) is None]
        if missing:
            raise RewardError(f"Checking instructions needs {' and '.join(missing)}: pip install 'rehearsal[ifeval]'.")

    def warm_up(self) -> None:
        _checkers()

    def verify(self, completion: str, task: Task) -> Score:
        text = without_thought(completion)
        texts = [text] if self.mode == "strict" else loose_variants(text)
        parts: dict[str, float] = {}
        for kind, arguments in _instructions(task):
            instruction = self._build(kind, arguments)
            count = 1 + sum(name.partition("#")[0] == kind for name in parts)
            followed = any(self._check(instruction, kind, variant) for variant in texts if variant.strip())
            parts[kind if count == 1 else f"{kind}#{count}"] = float(followed)
        share = sum(parts.values()) / len(parts)
        everything = all(parts.values())
        broken = ", ".join(name for name, part in parts.items() if not part)
        return Score(
            share if self.value == "share" else float(everything), everything, parts,
            "all instructions are followed" if everything else f"not followed: {broken}",
        )  # fmt: skip

    def _build(self, kind: str, arguments: Mapping[str, Any]) -> Any:
        checkers = _checkers()
        if kind not in checkers:
            raise VerificationError(f"There is no instruction {kind!r}; there are: {', '.join(sorted(checkers))}.")
        instruction = checkers[kind](kind)
        given = {name: argument for name, argument in arguments.items() if argument is not None}
        missing = sorted(set(instruction.get_instruction_args_keys()) - set(given))
        if missing:
            raise VerificationError(f"The instruction {kind} of this task lacks {', '.join(missing)}.")
        try:
            instruction.build_description(**given)
        except Exception as problem:
            raise VerificationError(f"The arguments of {kind} cannot be used: {problem}.") from problem
        if kind == "keywords:letter_frequency":
            letter = str(given["letter"]).lower()
            if len(letter) != 1:
                raise VerificationError(f"The instruction {kind} counts one character, not {letter!r}.")
            instruction._letter = letter
        return instruction

    def _check(self, instruction: Any, kind: str, text: str) -> bool:
        if kind in _NEEDS_SENTENCES:
            _find_sentence_model(self.nltk_data)
        try:
            return bool(instruction.check_following(text)) and (kind not in _NEEDS_LANGUAGE or _has_language(text))
        except Exception as problem:
            raise VerificationError(
                f"The checker of {kind} failed with {type(problem).__name__}: {problem}"
            ) from problem


def instruction_types() -> list[str]:
    """The ids of all types, sorted."""
    return sorted(_checkers())


def loose_variants(text: str) -> list[str]:
    """The eight texts in any of which an instruction may be followed, for the loose mode."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(variant.replace("*", "") for variant in cut)]


def _instructions(task: Task) -> list[tuple[str, Mapping[str, Any]]]:
    kinds = task.data.get("instruction_id_list")
    arguments = task.data.get("kwargs")
    usable = (
        isinstance(kinds, Sequence) and not isinstance(kinds, str) and len(kinds) > 0
        and isinstance(arguments, Sequence) and not isinstance(arguments, str) and len(arguments) == len(kinds)
        and all(isinstance(argument, Mapping) for argument in arguments)
    )  # fmt: skip
    if not usable:
        raise VerificationError(
            "The task has no instructions: its data needs instruction_id_list and, of the same length, kwargs."
        )
    assert kinds is not None and arguments is not None
    return [(str(kind), argument) for kind, argument in zip(kinds, arguments, strict=True)]


@functools.cache
def _checkers() -> Mapping[str, Any]:
    with _importing:
        import langdetect
        import nltk

        # On import the module looks for the sentence model, downloads it if it is not there, and says that it did
        # whether or not that worked.
        with mock.patch.object(nltk, "download", _no_download), contextlib.redirect_stdout(io.StringIO()):
            from lm_eval.tasks.ifeval import instructions_registry
        langdetect.DetectorFactory.seed = 0
    checkers: Mapping[str, Any] = instructions_registry.INSTRUCTION_DICT
    return checkers


def _has_language(text: str) -> bool:
    import langdetect

    try:
        langdetect.detect(text)
    except langdetect.LangDetectException:
        return False
    return True


def _no_download(*_: Any, **__: Any) -> bool:
    return False


@functools.cache
def _find_sentence_model(folder: str | None) -> None:
    import nltk

    if folder is not None and folder not in nltk.data.path:
        nltk.data.path.insert(0, folder)
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError as problem:
        raise VerificationError(
            f"The instructions {' and '.join(_NEEDS_SENTENCES)} need NLTK's sentence model, which is not here; "
            "run python -m nltk.downloader punkt_tab once, or name a folder that has it as nltk_data."
        ) from problem
