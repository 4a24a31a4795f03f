"""The books of a process: every account sees all that was used since it was opened, once."""

from __future__ import annotations

import os
import threading

import pytest

from rehearsal.usage import Account, added, count, is_usage, merged, usage_words


def test_an_account_sees_what_was_used_since_it_was_taken_last() -> None:
    count({"judge/requests": 3})
    account = Account()
    assert account.take() == {}
    count({"judge/requests": 2, "judge/cached": 0})
    count({"sandbox/filters": 1})
    late = Account()
    assert account.take() == {"judge/requests": 2, "sandbox/filters": 1}
    assert account.take() == {}
    count({"judge/requests": 1})
    assert account.take() == late.take() == {"judge/requests": 1}


def test_nothing_is_lost_between_threads() -> None:
    account = Account()
    taken: list[dict[str, float]] = []

    def use() -> None:
        for _ in range(2000):
            count({"judge/requests": 1})

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        taken.append(account.take())
    for thread in threads:
        thread.join()
    assert added(*taken, account.take()) == {"judge/requests": 16000}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_can_count_though_it_was_made_while_another_thread_did() -> None:
    from rehearsal import usage

    with usage._lock:  # as a thread that the fork does not have would hold it
        child = os.fork()
        if not child:
            free = usage._lock.acquire(timeout=5)
            os._exit(0 if free else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_facts_of_several_things() -> None:
    told = [{"sandbox": "filters"}, {}, {"sandbox": "namespaces", "judge": "m at u"}, {"sandbox": "filters"}]
    assert merged(told) == {"sandbox": "filters, namespaces", "judge": "m at u"}
    assert merged([merged(told), {"sandbox": "namespaces"}]) == merged(told)


def test_words() -> None:
    used = {
        "sandbox/namespaces": 1234, "sandbox/rlimits": 1, "judge/requests": 1500, "judge/cached": 2,
        "judge/prompt_tokens": 1e6, "judge/completion_tokens": 20, "judge/money": 0.1234,
    }  # fmt: skip
    assert usage_words(used) == {
        "Sandbox": "namespaces, 1,234 calls; rlimits, 1 call",
        "Judge": "1,500 requests, 2 from the cache, 1,000,000 tokens in, 20 tokens out, 0.1234 by its prices",
    }
    assert usage_words({}) == {}
    # What was there and never used is told as well.
    assert usage_words({}, {"sandbox": "filters", "judge": "m at u"}) == {
        "Sandbox": "filters, no call", "Judge": "m at u: never asked",
    }  # fmt: skip
    assert usage_words({"judge/requests": "many", "sandbox/x": None}) == {}
    assert all(map(is_usage, used)) and not is_usage("judge/own") and not is_usage("feedback/gain@2")
