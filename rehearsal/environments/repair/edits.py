"""Edits of a program, a line each: how they are written, what they do, and which of them lead from one to another."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

MAX_LINES = 60
MAX_WIDTH = 200
"""Of a program that an agent may make."""

_EDIT = re.compile(r"(?P<verb>replace|insert|delete)\s+(?P<line>\d{1,4})\s*(?P<rest>:.*)?", re.IGNORECASE | re.DOTALL)
_HOW = "Write replace 3: return a + b, insert 3: x = 0, or delete 3."


class EditError(ValueError):
    """An edit that cannot be made; the message says why, for the agent."""


def apply_edit(lines: Sequence[str], text: str) -> tuple[str, ...]:
    """The program after an edit.

    - ``replace N: TEXT`` puts another text in place of line N, counted from 1.
    - ``insert N: TEXT`` makes a new line before line N, or behind the last one.
    - ``delete N`` takes line N out.

    TEXT that begins with spaces of its own, beside the one behind the colon, keeps them. Any other has the indentation
    of line N (a new line behind the last one that of the last one); line 1 has none.

    Raises:
        EditError: for a text that is no edit, a line that there is not, or a program that grows too large.
    """
    found = _EDIT.fullmatch(text.strip())
    if found is None:
        raise EditError(f"This is no edit. {_HOW}")
    verb, line, rest = found["verb"].lower(), int(found["line"]), found["rest"]
    if (rest is None) != (verb == "delete"):
        raise EditError(f"delete takes no text. {_HOW}" if rest else f"{verb} needs a colon and a text. {_HOW}")
    last = len(lines) + (verb == "insert")
    if not 1 <= line <= last:
        raise EditError(f"There is no line {line} to {verb}; the program has {len(lines)} lines.")
    if verb == "delete":
        return (*lines[: line - 1], *lines[line:])
    if len(lines) >= MAX_LINES and verb == "insert":
        raise EditError(f"A program has no more than {MAX_LINES} lines.")
    model = lines[min(line, len(lines)) - 1] if line > 1 else ""
    new = _indented(rest[1:].rstrip(), model)
    return (*lines[: line - 1], new, *lines[line if verb == "replace" else line - 1 :])


def edits_between(lines: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Edits that make one program of another, from the last line to the first, so that no edit moves the lines of
    another."""
    edits: list[str] = []
    matcher = difflib.SequenceMatcher(None, lines, wanted, autojunk=False)
    for _, first, last, begin, end in reversed([code for code in matcher.get_opcodes() if code[0] != "equal"]):
        both = min(last - first, end - begin)
        edits += [f"delete {first + both + 1}"] * (last - first - both)
        edits += [f"insert {first + both + 1}: {line}" for line in reversed(wanted[begin + both : end])]
        edits += [f"replace {first + place + 1}: {wanted[begin + place]}" for place in reversed(range(both))]
    return edits


def _indented(text: str, model: str) -> str:
    text = text.removeprefix(" ")
    if "\n" in text or "\r" in text:
        raise EditError("An edit is about one line; the text has several.")
    if len(text) > MAX_WIDTH:
        raise EditError(f"A line has no more than {MAX_WIDTH} characters.")
    if not text.strip() or text[0].isspace():
        return text
    return model[: len(model) - len(model.lstrip())] + text
