"""Calls with a time limit: results, errors of every kind, and calls that are left behind."""

import threading

import pytest

from rehearsal.time_limit import LateError, in_time


def test_what_a_call_returns_is_returned_from_a_thread_of_that_name():
    assert in_time(lambda: threading.current_thread().name, 10, "somebody") == "somebody"
    assert in_time(lambda: None, 10, "nothing") is None


@pytest.mark.parametrize("error", [ValueError("wrong"), SystemExit(3), GeneratorExit()])
def test_what_a_call_raises_is_raised(error):
    def fails():
        raise error

    with pytest.raises(type(error)) as caught:
        in_time(fails, 10, "fails")
    assert caught.value is error


def test_an_interrupt_in_the_thread_is_not_the_users():
    def interrupts():
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="interrupted"):
        in_time(interrupts, 10, "interrupts")


def test_a_late_call_is_left_and_says_when_it_comes_back():
    go_on = threading.Event()
    with pytest.raises(LateError, match=r"0\.05 s") as caught:
        in_time(go_on.wait, 0.05, "late")
    assert not caught.value.done.is_set()
    go_on.set()
    assert caught.value.done.wait(10)
