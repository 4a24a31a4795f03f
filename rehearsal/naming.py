"""Things that users name: what a name stands for, and what they may have meant."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

from rehearsal.errors import RehearsalError


def hint(name: str, known: Iterable[str]) -> str:
    """What somebody who wrote ``name`` may have meant, as the end of a sentence: close names, or all there are."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(known) or 'none'}."


def secret_named(variable: str, what: str, error: type[RehearsalError]) -> str:
    """What an environment variable holds that must not stand in a recipe, such as a key.

    Args:
        variable: its name.
        what: it is to hold, for the message.
        error: raised, with one sentence, where it holds nothing.
    """
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise error(f"The environment variable {variable} is not set; put {what} into it.")
    return secret


def import_named(target: str, what: str, error: type[RehearsalError]) -> Any:
    """What ``package.module:Class`` stands for, a class or anything else; modules in the present folder are found too.

    Args:
        target: the name, with dots behind the colon for what lies inside a class.
        what: it is to be, for messages, such as "environment".
        error: raised, with one sentence, where there is no such thing.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        article = "an" if what[0] in "aeiou" else "a"
        raise error(f"{target!r} does not name {article} {what}; write package.module:Class.")
    # A console script does not look into the folder that it was started in, where people keep their own modules.
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except RehearsalError:
        raise
    except Exception as problem:
        raise error(
            f"The module {module_name} of the {what} {target} cannot be imported: {type(problem).__name__}: {problem}"
        ) from problem
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            raise error(f"There is no {part} in {module_name}{f'; did you mean {close[0]}?' if close else '.'}")
        found = getattr(found, part)
    return found
