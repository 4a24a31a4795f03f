"""The recipe's TOML with its comments, tables and keys marked for the eye."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_KEY = re.compile(r'^(\s*)([A-Za-z0-9_."\'-]+)(\s*=)(.*)$')
_COMMENT = re.compile(r"""^((?:[^"'#]|"(?:\\.|[^"\\])*"|'[^']*')*)(#.*)$""")


def highlighted(text: str) -> Markup:
    """The text as HTML, line by line; whatever is not recognised stays plain. Nothing is left out or changed."""
    return Markup("\n").join(_line(line) for line in text.splitlines())


def _line(line: str) -> Markup:
    comment = _COMMENT.match(line)
    body, tail = (comment[1], comment[2]) if comment else (line, "")
    key = _KEY.match(body)
    if body.lstrip().startswith("[") and not key:
        html = Markup('<b class="t">{}</b>').format(body)
    elif key:
        html = Markup('{}<span class="k">{}</span>{}{}').format(key[1], key[2], key[3], key[4])
    else:
        html = escape(body)
    return html + Markup('<span class="r">{}</span>').format(tail) if tail else html
