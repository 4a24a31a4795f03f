"""Text with an owner for every character: the pieces that a chat message is made of.

A *run* is a pair ``(text, kind)``. A rendered message is a list of runs: scaffolding of the chat template (kind
``TEMPLATE``) around what the environment and the harness say. Everything here works on characters; only
:func:`kinds_of_tokens` knows of tokens, through the offsets that a fast tokenizer reports.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rehearsal.trajectory import Kind


class Piece(NamedTuple):
    """A stretch of text for the model and the kind of its tokens (``SYSTEM``, ``OBSERVATION`` or ``NOTICE``)."""

    text: str
    kind: Kind


Run = tuple[str, Kind]
Change = Callable[[Sequence[Run]], list[Run]]


def joined(runs: Iterable[Run]) -> str:
    """The text of all runs."""
    return "".join(text for text, _ in runs)


def text_is_visible(content: Sequence[Run]) -> bool:
    """Whether there is anything but blanks in the content."""
    return any(text and not text.isspace() for text, _ in content)


# --- what chat templates do to a message's content -------------------------------------------------------------------


def _verbatim(runs: Sequence[Run]) -> list[Run]:
    return list(runs)


def _left_stripped(runs: Sequence[Run]) -> list[Run]:
    kept = list(runs)
    for index, (text, kind) in enumerate(kept):
        text = text.lstrip()
        kept[index] = (text, kind)
        if text:
            break
    return kept


def _right_stripped(runs: Sequence[Run]) -> list[Run]:
    kept = list(runs)
    for index in range(len(kept) - 1, -1, -1):
        text, kind = kept[index]
        kept[index] = (text.rstrip(), kind)
        if kept[index][0]:
            break
    return kept


def _stripped(runs: Sequence[Run]) -> list[Run]:
    return _right_stripped(_left_stripped(runs))


def _json_string(runs: Sequence[Run]) -> list[Run]:
    return [(json.dumps(text, ensure_ascii=False)[1:-1], kind) for text, kind in runs]


CHANGES: dict[str, Change] = {
    "verbatim": _verbatim,
    "strip": _stripped,
    "strip left": _left_stripped,
    "strip right": _right_stripped,
    "json": _json_string,
}
"""The changes of content that can be computed without running the template, by name, most common first."""


# --- special tokens spelled out in other people's text ---------------------------------------------------------------


class Defuser:
    """Breaks special tokens that are spelled out inside a message.

    A page, a file or a player that says ``<|im_end|>`` would otherwise end the turn and speak in the next role. A
    blank is put behind the first character (``< |im_end|>``): people and models can still read the text, and the
    tokenizer no longer takes it for the special token.

    Args:
        control: tokens that the chat template itself uses, or that end a turn; broken wherever they appear.
        special: all other special tokens of the vocabulary; broken in observations only, because the harness may want
            to name one of its own (``<think>``) in the rules.
    """

    def __init__(self, control: Iterable[str], special: Iterable[str]) -> None:
        self._control = frozenset(token for token in control if token.strip())
        everything = self._control | {token for token in special if token.strip()}
        # Longest first: a token may begin with another one.
        alternatives = "|".join(re.escape(token) for token in sorted(everything, key=len, reverse=True))
        self._pattern = re.compile(alternatives) if alternatives else None

    def __call__(self, runs: Sequence[Run]) -> tuple[list[Run], int]:
        """The runs without special tokens, and how many were broken."""
        kept = list(runs)
        if self._pattern is None or self._pattern.search(joined(kept)) is None:
            return kept, 0
        # A token may be spelled across two runs, so the search is over the whole message. Breaking one never makes
        # another in practice; should it, the next pass breaks that too.
        total = 0
        while cuts := self._cuts(kept):
            kept = _with_blanks(kept, cuts)
            total += len(cuts)
        return kept, total

    def _cuts(self, runs: Sequence[Run]) -> list[int]:
        assert self._pattern is not None
        text = joined(runs)
        observed = np.zeros(len(text), dtype=bool)
        end = 0
        for run, kind in runs:
            observed[end : end + len(run)] = kind == Kind.OBSERVATION
            end += len(run)
        cuts: list[int] = []
        position = 0
        while match := self._pattern.search(text, position):
            if match.group() in self._control or observed[match.start() : match.end()].any():
                cuts.append(match.start() + 1)
            position = match.start() + 1
        return cuts


def _with_blanks(runs: Sequence[Run], cuts: Sequence[int]) -> list[Run]:
    """Put a blank before each character position in ``cuts`` (ascending), into the run that owns the one before."""
    result: list[Run] = []
    end = 0
    remaining = list(cuts)
    for text, kind in runs:
        begin, end = end, end + len(text)
        parts: list[str] = []
        done = begin
        while remaining and remaining[0] <= end:
            cut = remaining.pop(0)
            parts.append(text[done - begin : cut - begin])
            done = cut
        parts.append(text[done - begin :])
        result.append((" ".join(parts), kind))
    return result


# --- finding content in a rendered text, and tokens in it ------------------------------------------------------------


def located(content: Sequence[Run], rendered: str) -> list[Run]:
    """``rendered`` as runs, with the characters of ``content`` found in it; all others belong to the template.

    The content may stand there word for word or trimmed; where the template did more to it, both texts are aligned and
    the characters that they share in order keep their kind.
    """
    for change in CHANGES.values():
        changed = [run for run in change(content) if run[0]]
        start = rendered.find(joined(changed)) if changed else -1
        if start >= 0:
            end = start + len(joined(changed))
            return [(rendered[:start], Kind.TEMPLATE), *changed, (rendered[end:], Kind.TEMPLATE)]
    source = joined(content)
    kinds = np.repeat([int(kind) for _, kind in content], [len(text) for text, _ in content])
    found = np.full(len(rendered), int(Kind.TEMPLATE))
    matcher = difflib.SequenceMatcher(None, source, rendered, autojunk=len(source) > 2000)
    for block in matcher.get_matching_blocks():
        found[block.b : block.b + block.size] = kinds[block.a : block.a + block.size]
    borders = [0, *(np.flatnonzero(np.diff(found)) + 1).tolist(), len(rendered)]
    return [(rendered[a:b], Kind(int(found[a]))) for a, b in itertools.pairwise(borders) if b > a]


def kinds_of_tokens(encoding: Any, runs: Sequence[Run]) -> np.ndarray:
    """The kind of each token of an encoded text.

    A token that lies inside the runs of one kind has that kind; a token that touches two kinds has no single owner and
    is ``TEMPLATE``, so no objective takes it for the environment's words.

    Args:
        encoding: a ``tokenizers.Encoding`` of ``joined(runs)`` with offsets in characters.
        runs: the text's runs.

    Returns:
        int8 of shape (T,).
    """
    # One pass in plain Python: a turn has some tens of tokens, for which this is several times faster than arrays.
    bounds: list[int] = []
    owners: list[int] = []
    end = 0
    for text, kind in runs:
        end += len(text)
        if text and owners and owners[-1] == kind:
            bounds[-1] = end
        elif text:
            bounds.append(end)
            owners.append(int(kind))
    template = int(Kind.TEMPLATE)
    kinds: list[int] = []
    run = 0
    last_run = len(bounds) - 1
    covered = 0
    for start, stop in encoding.offsets:
        # Some tokenizers leave the blank that a token begins with out of its offsets: a gap belongs to the token after
        # it.
        start = min(start, covered)
        covered = max(covered, stop)
        while run < last_run and bounds[run] <= start:
            run += 1
        inside = run <= last_run and stop <= bounds[run] and (run == 0 or start >= bounds[run - 1])
        kinds.append(owners[run] if inside else template)
    return np.array(kinds, dtype=np.int8)
