"""Values that cross between processes that do not trust each other.

Only plain data crosses: what is read is built from the standard types alone, so no class of the writer, and with it no
``__eq__``, ``__reduce__`` or ``__repr__`` of its making, ever reaches the reader. Pickle would run code; this cannot.
An instance of a subclass of a plain type (a ``Counter``, an ``IntEnum``) crosses as that plain type, an iterator as an
iterator over its first values.
"""

from __future__ import annotations

import base64
import decimal
import fractions
import itertools
from collections.abc import Iterator
from typing import Any

DEEPEST = 60
"""Levels of nesting."""
MOST_ITEMS = 200_000
"""Members of all containers of a value together; an iterator is cut here."""
_EXACT = 2**53
"""Integers below this are exact wherever JSON is read."""


class PlainError(Exception):
    """A value that is not plain data, or too much of it."""


def encode(value: Any) -> Any:
    """A value as something that JSON holds.

    Raises:
        PlainError: for a type that does not cross, nesting deeper than :data:`DEEPEST` or more than
            :data:`MOST_ITEMS` items.
    """
    return _encoded(value, DEEPEST, itertools.count(1))


def decode(coded: Any) -> Any:
    """What :func:`encode` was given, in standard types.

    Raises:
        PlainError: for anything that :func:`encode` does not write.
    """
    try:
        return _decoded(coded, DEEPEST)
    except PlainError:
        raise
    except Exception as error:  # forged by the other side: unhashable members of a set, rubbish for a number
        raise PlainError(f"a value that cannot be read: {type(error).__name__}") from error


def _encoded(value: Any, depth: int, counter: Iterator[int]) -> Any:
    if depth == 0:
        raise PlainError(f"a value nested deeper than {DEEPEST} levels")
    if next(counter) > MOST_ITEMS:
        raise PlainError(f"a value of more than {MOST_ITEMS} items")
    if value is None or value is True or value is False:
        return value

    def each(values: Any) -> list[Any]:
        return [_encoded(item, depth - 1, counter) for item in values]

    # Exact constructors, because methods of a subclass may say something else than the base type holds.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if abs(number) < _EXACT else {"int": hex(number)}
    if isinstance(value, float):
        return {"float": float.__repr__(value)}
    if isinstance(value, list):
        return each(list.__iter__(value))
    if isinstance(value, tuple):
        return {"tuple": each(tuple.__iter__(value))}
    if isinstance(value, dict):
        return {"dict": [each(pair) for pair in dict.items(value)]}
    if isinstance(value, (set, frozenset)):
        return {"set" if isinstance(value, set) else "frozenset": each(iter(value))}
    if isinstance(value, complex):
        return {"complex": [float.__repr__(value.real), float.__repr__(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        kind = "bytes" if isinstance(value, bytes) else "bytearray"
        return {kind: base64.b64encode(bytes(value)).decode("ascii")}
    if isinstance(value, range):
        return {"range": [hex(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, decimal.Decimal):
        return {"decimal": str(value)}
    if isinstance(value, fractions.Fraction):
        return {"fraction": [hex(value.numerator), hex(value.denominator)]}
    if hasattr(type(value), "__next__"):
        return {"iterator": each(itertools.islice(value, MOST_ITEMS))}
    if isinstance(value, (type({}.keys()), type({}.values()), type({}.items()))):
        return {"iterator": each(value)}
    raise PlainError(f"a value of type {type(value).__name__}")


def _decoded(coded: Any, depth: int) -> Any:
    if depth == 0:
        raise PlainError("a value nested too deep")
    if coded is None or isinstance(coded, (bool, int, str)):
        return coded
    if isinstance(coded, list):
        return [_decoded(item, depth - 1) for item in coded]
    if not isinstance(coded, dict) or len(coded) != 1:
        raise PlainError("a value in no known form")
    ((kind, content),) = coded.items()

    def each() -> list[Any]:
        return [_decoded(item, depth - 1) for item in content]

    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(each())
    if kind == "dict":
        return {_decoded(key, depth - 1): _decoded(value, depth - 1) for key, value in content}
    if kind == "set":
        return set(each())
    if kind == "frozenset":
        return frozenset(each())
    if kind == "complex":
        return complex(float(content[0]), float(content[1]))
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "bytearray":
        return bytearray(base64.b64decode(content, validate=True))
    if kind == "range":
        return range(*(int(part, 16) for part in content))
    if kind == "decimal":
        return decimal.Decimal(content)
    if kind == "fraction":
        return fractions.Fraction(int(content[0], 16), int(content[1], 16))
    if kind == "iterator":
        return iter(each())
    raise PlainError(f"a value of unknown kind {str(kind)[:40]!r}")
