"""What runs inside: messages, plain values, and the filter of system calls, instruction by instruction."""

from __future__ import annotations

import collections
import contextlib
import enum
import errno
import json
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.sandbox.inside import plain, seccomp
from rehearsal.sandbox.inside.framing import FramingError, Unpacker, pack

MESSAGES = st.dictionaries(st.text(), st.one_of(st.none(), st.integers(), st.text(), st.lists(st.booleans())))


@given(st.lists(MESSAGES, max_size=5), st.lists(st.integers(1, 50), min_size=1))
def test_messages_survive_any_cut(messages: list[dict[str, Any]], cuts: list[int]) -> None:
    stream = b"".join(map(pack, messages))
    unpacker, found, at = Unpacker(1 << 20), [], 0
    while at < len(stream):
        step = cuts[at % len(cuts)]
        found += unpacker.feed(stream[at : at + step])
        at += step
    assert found == messages


@given(st.binary(max_size=200))
def test_rubbish_is_an_error_or_nothing(data: bytes) -> None:
    with contextlib.suppress(FramingError):
        assert all(isinstance(message, dict) for message in Unpacker(100).feed(data))


@pytest.mark.parametrize("body", [b"[]", b"1", b"{", b"\xff", b"[" * 90_000, b'{"a": ' * 10_000])
def test_what_is_no_object_is_an_error(body: bytes) -> None:
    with pytest.raises(FramingError):
        Unpacker(1 << 20).feed(len(body).to_bytes(4, "big") + body)


def test_a_long_message_is_refused_at_its_length() -> None:
    with pytest.raises(FramingError, match="4294967295"):
        Unpacker(1000).feed(b"\xff\xff\xff\xff")


KEYS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
        st.complex_numbers(allow_nan=False), st.decimals(allow_nan=False), st.fractions(),
    ),
    lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
VALUES = st.recursive(
    KEYS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=3), st.sets(KEYS, max_size=3),
        st.tuples(inner), st.builds(range, st.integers(-(10**20), 10**20), st.integers(), st.integers(1, 9)),
        st.binary().map(bytearray),
    ),
    max_leaves=12,
)  # fmt: skip


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b and repr(a) == repr(b) if not isinstance(a, set | frozenset) else a == b


@given(VALUES)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    back = plain.decode(json.loads(json.dumps(plain.encode(value))))
    assert type(back) is type(value)
    assert back == value
    assert not isinstance(value, float) or math.copysign(1, value) == math.copysign(1, back)


def test_not_a_number_and_iterators_cross() -> None:
    assert math.isnan(plain.decode(plain.encode(math.nan)))
    assert list(plain.decode(plain.encode(map(str, [1, 2])))) == ["1", "2"]
    assert list(plain.decode(plain.encode({1: 2}.items()))) == [(1, 2)]


def test_subclasses_cross_as_what_they_are_made_of() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __int__(self) -> int:
            return 99

        __hash__ = int.__hash__

    class Text(str):
        def __str__(self) -> str:
            return "forged"

    class Colour(enum.IntEnum):
        RED = 4

    for value, wanted in (
        (Liar(3), 3),
        (Text("x"), "x"),
        (Colour.RED, 4),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
    ):
        back = plain.decode(plain.encode(value))
        assert back == wanted and type(back) in (int, str, dict)


@pytest.mark.parametrize("value", [object(), lambda: 1, type, [1, [object()]], {1: object()}])
def test_other_values_do_not_cross(value: Any) -> None:
    with pytest.raises(plain.PlainError):
        plain.encode(value)


def test_too_much_does_not_cross() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(plain.PlainError, match="deeper"):
        plain.encode(endless)
    with pytest.raises(plain.PlainError, match="items"):
        plain.encode([0] * (plain.MOST_ITEMS + 1))


@given(st.recursive(st.one_of(st.none(), st.integers(), st.text(max_size=5), st.floats()),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(
                        ["set", "dict", "int", "tuple", "range", "decimal", "bytes", "complex", "iterator"]), inner,
                        max_size=2)), max_leaves=8))  # fmt: skip
def test_forged_values_are_read_as_plain_ones_or_refused(coded: Any) -> None:
    try:
        value = plain.decode(coded)
    except plain.PlainError:
        return
    assert type(value).__module__ in ("builtins", "decimal", "fractions")


def test_exact_types() -> None:
    for value in (Decimal("1.50"), Fraction(1, 3), 10**30, (), frozenset({1})):
        assert same(plain.decode(plain.encode(value)), value)


# The filter of system calls


def verdict(
    machine: str, number: int, arguments: tuple[int, ...] = (), *, signals: bool = False, attributes: bool = False,
    arch: int = 0,
) -> int:  # fmt: skip
    """What the filter says of a call, by running its instructions as the kernel would."""
    lines = seccomp.program(machine, 77, own_signals_only=signals, keep_attributes=attributes)
    data = {0: number, 4: arch or seccomp._ARCHITECTURES[machine]}
    data |= {16 + 8 * index: value & 0xFFFF_FFFF for index, value in enumerate((*arguments, *[0] * 6)[:6])}
    at, accumulator = 0, 0
    while True:
        code, jump_true, jump_false, constant = lines[at]
        at += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            accumulator = data[constant]
            continue
        holds = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: bool(accumulator & constant)}[code]
        at += jump_true if holds else jump_false


ALLOWED, KILLED = 0x7FFF_0000, 0x8000_0000


def refused(number: int) -> int:
    return 0x0005_0000 | number


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_denied_calls_are_refused_and_others_pass(machine: str) -> None:
    column = list(seccomp._ARCHITECTURES).index(machine)
    denied = {numbers[column] for numbers in seccomp.DENIED.values() if numbers[column] is not None}
    special = {numbers[column] for numbers in (seccomp._SOCKET, seccomp._CLONE3, seccomp._SOCKETPAIR)}
    for number in range(470):
        said = verdict(machine, number)
        if number in denied:
            assert said == refused(errno.EPERM), number
        elif number not in special:
            assert said == ALLOWED, number
    assert verdict(machine, seccomp._SOCKET[column], (2,)) == refused(errno.EACCES)
    assert verdict(machine, seccomp._CLONE3[column]) == refused(errno.ENOSYS)
    assert verdict(machine, 0, arch=0x4000_0003) == KILLED


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_calls_that_depend_on_their_arguments(machine: str) -> None:
    column = list(seccomp._ARCHITECTURES).index(machine)
    clone, ioctl = seccomp._CLONE[column], seccomp._IOCTL[column]
    assert verdict(machine, clone, (17,)) == ALLOWED
    assert verdict(machine, clone, (0x1000_0011,)) == refused(errno.EPERM)
    assert verdict(machine, clone, (0x003D_0F00,)) == ALLOWED, "the flags of a thread"
    assert verdict(machine, ioctl, (0, 0x5401)) == ALLOWED
    assert verdict(machine, ioctl, (0, 0x5412)) == refused(errno.EPERM)
    limit = seccomp._ABOUT_ITSELF["prlimit64"][column]
    assert [verdict(machine, limit, (pid,)) for pid in (0, 77, 1)] == [ALLOWED, ALLOWED, refused(errno.EPERM)]
    kill = seccomp._SIGNALS["kill"][column]
    assert verdict(machine, kill, (1, 9)) == ALLOWED
    assert verdict(machine, kill, (1, 9), signals=True) == refused(errno.EPERM)
    assert verdict(machine, kill, (0xFFFF_FFFF, 9), signals=True) == refused(errno.EPERM)
    assert verdict(machine, kill, (77, 9), signals=True) == ALLOWED
    pair, fcntl = seccomp._SOCKETPAIR[column], seccomp._FCNTL[column]
    for kind, said in ((1, ALLOWED), (0x8_0801, ALLOWED), (2, refused(errno.EPERM)), (0x8_0002, refused(errno.EPERM))):
        assert verdict(machine, pair, (1, kind)) == said, "of sockets only streams in pairs"
    assert verdict(machine, pair, (16, 1)) == refused(errno.EPERM)
    for command in range(16):
        owner = command in (8, 10, 15)
        assert verdict(machine, fcntl, (3, command)) == (refused(errno.EPERM) if owner else ALLOWED)
    assert verdict(machine, fcntl, (3, 1031, 1 << 20)) == refused(errno.EPERM), "pipes keep their size"
    for option in range(1, 64):
        larger = option in (7, 32)
        said = verdict(machine, seccomp._SETSOCKOPT[column], (3, 1, option))
        assert said == (refused(errno.EPERM) if larger else ALLOWED), "and so do the buffers of sockets"
    assert verdict(machine, ioctl, (0, 0x8901)) == verdict(machine, ioctl, (0, 0x8902)) == refused(errno.EPERM)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_attributes_of_files_stay_only_where_that_is_asked_for(machine: str) -> None:
    column = list(seccomp._ARCHITECTURES).index(machine)
    for calls, answer in ((seccomp._ATTRIBUTES, errno.EPERM), (seccomp._MODES_AND_TIMES, 0)):
        for numbers in calls.values():
            number = numbers[column]
            if number is not None:
                assert verdict(machine, number, attributes=True) == refused(answer)
                assert verdict(machine, number) == ALLOWED


def test_the_other_convention_of_the_same_processor_is_shut() -> None:
    assert verdict("x86_64", 0x4000_0000 + 41) == refused(errno.ENOSYS)
