"""Which part of a completion is the answer, and how texts are compared."""

from __future__ import annotations

import re
import string
import unicodedata

from rehearsal.rewards.verifier import Task, VerificationError

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
"""What an agent marks as its answer."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def without_thought(completion: str) -> str:
    """What follows the thought.

    The thought ends with the last ``</think>``, whether its ``<think>`` is part of the completion or of the prompt. A
    thought that never ends has no answer behind it, so "" is returned: what an agent only considered must not count.
    """
    _, _, rest = completion.rpartition("</think>")
    return rest.partition("<think>")[0].strip()


def answer_of(completion: str) -> str:
    """The answer in a completion: what stands in the last ``<answer>…</answer>`` after the thought, or else everything
    after the thought. So of many answers only the last one counts, and listing guesses gains nothing."""
    rest = without_thought(completion)
    tagged = ANSWER.findall(rest)
    return tagged[-1].strip() if tagged else rest


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and repeated spaces, as SQuAD's and HotpotQA's evaluations compare.

    Where that leaves nothing, as of the answer "A" or "+", articles are kept, and then punctuation: in those
    evaluations such an answer is matched by every other one of its kind, and by no answer at all.
    """
    bare = text.lower().translate(_NO_PUNCTUATION)
    left = (_ARTICLES.sub(" ", bare), bare, text.lower())
    return next((" ".join(words.split()) for words in left if words.strip()), "")


def prompt_key(prompt: str) -> str:
    """A prompt as it is compared with others: compatible forms of Unicode made one, without case, repeated spaces, and
    punctuation at the ends. What stands inside is kept: 3 + 5 is not 3 - 5."""
    folded = unicodedata.normalize("NFKC", prompt).casefold()
    return " ".join(folded.split()).strip(string.punctuation + " ")


def reference_texts(task: Task) -> tuple[str, ...]:
    """The reference of a task as texts: a text, a number, or a sequence of those.

    Raises:
        VerificationError: for anything else, and for no reference at all.
    """
    given = task.reference
    items = list(given) if isinstance(given, list | tuple) else [given]
    if not items or any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
        raise VerificationError(
            f"The reference of this task must be a text, a number or a list of those, not {str(given)[:80]!r}."
        )
    return tuple(str(item) for item in items)
