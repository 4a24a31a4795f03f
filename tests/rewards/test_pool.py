"""The pool: every item answered, in order, whatever the verifiers do, from any thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sandbox"))

from pools import children_of, is_zombie
from strange import Broken, DiesAtStart, SlowStart, Strange, Unlucky

from rehearsal.errors import RewardError
from rehearsal.rewards.mathematics import LastNumber
from rehearsal.rewards.pool import VerifierPool
from rehearsal.rewards.structure import Pattern
from rehearsal.rewards.verifier import Failure, Score, Task, VerificationError, reward_of
from rehearsal.rewards.worker import WorkerProcess

TASK = Task("a task")


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(Strange(), workers=2, timeout=1.0, chunk=8) as made:
        made.wait_until_warm()
        yield made


def kinds(results: list[Score | Failure]) -> list[str]:
    return ["score" if isinstance(result, Score) else result.kind for result in results]


def check(pool: VerifierPool, *completions: str) -> list[Score | Failure]:
    return pool.verify(completions, [TASK] * len(completions))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_scores_come_back_whole_and_in_order(pool: VerifierPool) -> None:
    texts = ["x" * (n % 50) for n in range(500)]
    results = check(pool, *texts)
    assert results == [Score(float(len(t)), len(t) > 3, {"length": float(len(t))}, t) for t in texts]
    assert check(pool) == []


@pytest.mark.parametrize(
    ("completion", "kind", "message"),
    [
        ("sleep 60", "timeout", "longer than 1 s"),
        ("regex", "timeout", "longer than 1 s"),
        ("native", "timeout", "longer than 1 s"),
        ("exit", "crash", "ended with code 3"),
        ("kill", "crash", "killed by SIGKILL"),
        ("segfault", "crash", "killed by SIGSEGV"),
        ("leave", "error", "SystemExit"),
        ("raise", "error", "ZeroDivisionError: as asked"),
        ("cannot", "error", "The verifier cannot say."),
        ("nan", "error", "must be finite"),
        ("nothing", "error", "returned NoneType instead of a score"),
        ("memory", "error", "MemoryError"),
        ("unpicklable", "error", "cannot cross"),
    ],
)
def test_what_goes_wrong_costs_only_itself(pool: VerifierPool, completion: str, kind: str, message: str) -> None:
    fine = [f"fine {n}" for n in range(20)]
    before = pool.counters["strange"].figures()
    started = time.monotonic()
    results = check(pool, *fine[:9], completion, *fine[9:])
    assert time.monotonic() - started < 60
    bad = results.pop(9)
    assert [result.evidence for result in results if isinstance(result, Score)] == fine
    assert isinstance(bad, Failure) and bad.kind == kind and message in bad.message
    after = pool.counters["strange"].figures()
    plural = {"timeout": "timeouts", "crash": "crashes", "error": "errors"}[kind]
    assert after[plural] - before[plural] == 1
    assert after["checks"] - before["checks"] == 21
    assert reward_of(bad) != reward_of(bad), "a failure has no reward: NaN, not 0"


def test_several_hangs_in_one_chunk_cost_a_time_limit_each(pool: VerifierPool) -> None:
    texts = ["sleep 60" if n % 3 == 0 else f"fine {n}" for n in range(12)]
    assert kinds(check(pool, *texts)) == ["timeout" if n % 3 == 0 else "score" for n in range(12)]


def test_a_slow_check_below_the_limit_is_scored(pool: VerifierPool) -> None:
    """The limit is for one check, not for a chunk: eight of 0.3 s take longer than 1 s together."""
    assert kinds(check(pool, *["sleep 0.3"] * 8)) == ["score"] * 8


def test_what_a_verifier_prints_does_no_harm(pool: VerifierPool) -> None:
    assert kinds(check(pool, "print", "fine", "print")) == ["score"] * 3


def test_it_works_off_the_main_thread_and_from_several_at_once(pool: VerifierPool) -> None:
    """Where the time limit is a signal, every check in another thread fails, and peers scored all of them 0."""
    found: dict[int, list[str]] = {}

    def work(number: int) -> None:
        found[number] = kinds(check(pool, *[f"text {number}"] * 10, "sleep 60" if number == 0 else "more"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {n: ["score"] * 10 + ["timeout" if n == 0 else "score"] for n in range(6)}


def test_a_task_that_cannot_be_sent_is_an_error(pool: VerifierPool) -> None:
    results = pool.verify(["one", "two"], [Task("x", reference=lambda: None), TASK])
    assert kinds(results) == ["error", "score"]


def test_a_process_killed_from_outside_is_replaced() -> None:
    with VerifierPool(Strange(), workers=2, timeout=60.0, chunk=1) as pool:
        pool.wait_until_warm()
        workers = [driver._worker for driver in pool._drivers]

        def kill() -> None:
            while any(worker.begun != 1 for worker in workers):  # until both are at their long check
                time.sleep(0.01)
            for worker in workers:
                os.kill(worker._process.pid, 9)

        threading.Thread(target=kill, daemon=True).start()
        assert kinds(check(pool, *["sleep 50"] * 2, *["fine"] * 30)) == ["crash"] * 2 + ["score"] * 30
        assert pool.restarts == 2


def test_stop_signals_are_for_the_parent() -> None:
    with VerifierPool(Strange(), workers=2, timeout=60.0, chunk=1) as pool:

        def stop() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                for driver in pool._drivers:
                    os.kill(driver._worker._process.pid, number)

        until(lambda: all(driver._worker is not None for driver in pool._drivers))
        stop()  # while they load their libraries
        pool.wait_until_warm()
        checked: list[Score | Failure] = []
        thread = threading.Thread(target=lambda: checked.extend(check(pool, *["sleep 2"] * 2, *["fine"] * 8)))
        thread.start()
        until(lambda: all(driver._worker.begun == 1 for driver in pool._drivers))
        stop()
        thread.join()
        assert kinds(checked) == ["score"] * 10
        assert pool.restarts == 0


@pytest.mark.parametrize(("completion", "kind"), [("child", "timeout"), ("orphan", "crash")])
def test_what_a_verifier_started_ends_with_it(tmp_path: Path, completion: str, kind: str) -> None:
    with VerifierPool(Strange(), workers=1, timeout=2.0) as pool:
        file = tmp_path / "pid"
        assert kinds(pool.verify([completion], [Task("x", reference=str(file))])) == [kind]
        child = int(file.read_text())
        for _ in range(300):
            if is_zombie(child):
                break
            time.sleep(0.1)
        assert is_zombie(child)


def test_what_a_verifier_started_ends_with_a_process_that_ended_itself(tmp_path: Path) -> None:
    """It holds the pipe of the results, so that their end never comes: it was a hang, and it lived on."""
    file = tmp_path / "pid"
    with VerifierPool(Strange(), workers=1, timeout=30.0) as pool:
        pool.wait_until_warm()
        begun = time.monotonic()
        (failure, score) = pool.verify(["orphan", "fine"], [Task("x", reference=str(file)), TASK])
        assert kinds([failure, score]) == ["crash", "score"]
        assert isinstance(failure, Failure)
        assert "ended with code 5" in failure.message
        assert time.monotonic() - begun < 25.0
        assert is_zombie(int(file.read_text()))


def test_a_pool_recovers_from_processes_that_die_as_they_start(tmp_path: Path) -> None:
    """As where a system that is short of memory kills them for a while."""
    file = tmp_path / "die"
    with VerifierPool(Unlucky(str(file)), workers=1) as pool:
        pool.wait_until_warm()
        file.touch()
        assert kinds(check(pool, "die")) == ["crash"], "what was found is told, whatever comes then"
        with pytest.raises(RewardError, match="times in a row"):
            check(pool, "fine")
        file.unlink()
        assert kinds(check(pool, "fine", "fine")) == ["score"] * 2


def test_a_pool_gives_up_where_processes_never_start_again(tmp_path: Path) -> None:
    file = tmp_path / "die"
    with VerifierPool(Unlucky(str(file)), workers=1) as pool:
        pool.wait_until_warm()
        file.touch()
        check(pool, "die")
        for _ in range(4):
            with pytest.raises(RewardError, match="times in a row"):
                check(pool, "fine")
        file.unlink()
        begun = time.monotonic()
        with pytest.raises(RewardError, match="times in a row"):
            check(pool, "fine")
        assert time.monotonic() - begun < 60.0, "nothing more is tried"


def test_a_process_that_cannot_be_had_takes_no_work_from_the_others(tmp_path: Path) -> None:
    """One that fails at once would be the quickest to take every chunk."""
    with VerifierPool(Unlucky(str(tmp_path / "first"), once=True), workers=3) as pool:
        with pytest.raises(RewardError, match="times in a row"):
            pool.wait_until_warm()
        for driver in pool._drivers:
            driver.warm.wait()
        assert kinds(check(pool, *["fine"] * 60)) == ["score"] * 60


def test_whatever_goes_wrong_in_the_pool_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers would otherwise wait for ever."""
    with VerifierPool(Strange(), workers=1) as pool:
        pool.wait_until_warm()
        before = set(children_of(os.getpid()))

        def no_thread(self: WorkerProcess, items: list[bytes]) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(WorkerProcess, "send_chunk", no_thread)
            with pytest.raises(RewardError, match="can't start new thread"):
                check(pool, "fine")
        assert kinds(check(pool, "fine")) == ["score"]
        assert len(before & set(children_of(os.getpid()))) < len(before), "the process was not left behind"


def test_nothing_is_left_after_closing() -> None:
    before = set(children_of(os.getpid()))
    pool = VerifierPool(Strange(), workers=2)
    check(pool, "fine")
    assert len(set(children_of(os.getpid())) - before) == 2
    pool.close()
    pool.close()
    assert set(children_of(os.getpid())) <= before
    with pytest.raises(RewardError, match="closed"):
        check(pool, "fine")


def test_closing_does_not_wait_for_processes_that_are_about_to_start() -> None:
    before = set(children_of(os.getpid()))
    pool = VerifierPool(SlowStart(), workers=2)
    time.sleep(0.3)
    begun = time.monotonic()
    pool.close(now=True)
    assert time.monotonic() - begun < 20.0
    assert set(children_of(os.getpid())) <= before


def test_an_exception_does_not_wait_for_the_rest() -> None:
    problems: list[Exception] = []

    def work(pool: VerifierPool) -> None:
        try:
            check(pool, *["sleep 5"] * 40)
        except RewardError as problem:
            problems.append(problem)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), VerifierPool(Strange(), workers=2, timeout=60) as pool:
        pool.wait_until_warm()
        thread = threading.Thread(target=work, args=(pool,))
        thread.start()
        time.sleep(0.5)
        raise KeyboardInterrupt
    thread.join(60)
    assert time.monotonic() - started < 60  # waiting for all would take 100
    assert "closed" in str(problems[0])


def test_processes_end_when_their_parent_is_killed() -> None:
    """Even one that hangs: it carries an alarm of its own."""
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
        import dataclasses, threading, time
        from strange import Strange
        from rehearsal.rewards.pool import VerifierPool
        from rehearsal.rewards.verifier import Task
        pool = VerifierPool(Strange(), workers=2, timeout=0.5)
        pool.wait_until_warm()
        for driver in pool._drivers:  # the parent does not stop it
            driver._limits = dataclasses.replace(driver._limits, timeout=600)
        threading.Thread(target=pool.verify, args=(["native"], [Task("x")]), daemon=True).start()
        time.sleep(0.5)
        print("here", flush=True)
        time.sleep(600)
    """)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"here\n"
    workers = children_of(parent.pid)
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not all(map(is_zombie, workers)):
        time.sleep(0.1)
    assert all(map(is_zombie, workers))


def test_catastrophic_patterns_are_stopped() -> None:
    with VerifierPool(Pattern("(a|a)*b"), workers=1, timeout=1.0) as pool:
        results = pool.verify(["a" * 60, "ab", "a" * 60, "b"], [TASK] * 4)
    assert kinds(results) == ["timeout", "score", "timeout", "score"]
    assert [result.passed for result in results if isinstance(result, Score)] == [True, True]


def test_several_verifiers_in_one_pool() -> None:
    with VerifierPool({"number": LastNumber(), "word": Pattern("[a-z]+")}, workers=1) as pool:
        results = pool.verify(["12", "abc"], [Task("x", "12"), TASK], ["number", "word"])
        assert [reward_of(result) for result in results] == [1.0, 1.0]
        assert pool.counters["number"].checks == pool.counters["word"].passed == 1
        with pytest.raises(RewardError, match="which of these verifiers checks what: number, word"):
            pool.verify(["12"], [TASK])
        with pytest.raises(RewardError, match="no verifier 'code'; there are: number, word"):
            pool.verify(["12"], [TASK], "code")
        with pytest.raises(RewardError, match="2 completions for 1 tasks"):
            pool.verify(["12", "13"], [TASK], "word")
        with pytest.raises(RewardError, match="1 names of verifiers for 2"):
            pool.verify(["12", "13"], [TASK, TASK], ["word"])


@pytest.mark.parametrize(
    ("verifier", "message"), [(Broken(), "no such library"), (DiesAtStart(), "ended with code 7 3 times in a row")]
)
def test_verifiers_that_cannot_start_are_told_at_once(verifier: object, message: str) -> None:
    with VerifierPool(verifier, workers=2) as pool:  # type: ignore[arg-type]
        with pytest.raises(RewardError, match=message):
            check(pool, "one", "two")
        with pytest.raises(RewardError, match=message):
            pool.wait_until_warm()


def test_a_process_that_cannot_be_had_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as where no thread can be started for it."""

    def no_more(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("rehearsal.rewards.driver.WorkerProcess", no_more)
    with VerifierPool(Strange(), workers=1) as pool, pytest.raises(RewardError, match="new thread"):
        pool.wait_until_warm()
        check(pool, "fine")


def test_bad_pools() -> None:
    with pytest.raises(RewardError, match="timeout of a pool of verifiers must be above 0, not 0"):
        VerifierPool(Strange(), timeout=0)
    with pytest.raises(RewardError, match="at least one verifier"):
        VerifierPool({})
    local = type("Local", (), {"name": "local", "verify": lambda self, completion, task: Score(1.0, True)})
    with pytest.raises(RewardError, match="cannot be sent to another process"):
        VerifierPool(local())


class InThreads:
    """Waits for something, and sometimes for ever."""

    name = "threads"
    runs_in = "thread"

    def __init__(self) -> None:
        self.at_once = self.most = 0
        self.lock = threading.Lock()

    def verify(self, completion: str, task: Task) -> Score:
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(30 if completion == "hang" else 0.05)
        with self.lock:
            self.at_once -= 1
        if completion == "leave":
            raise SystemExit
        if completion == "cannot":
            raise VerificationError("no")
        return Score(1.0, True, evidence=completion)


class AtOnce:
    """Likes many at once."""

    name = "at once"
    runs_in = "thread"

    def verify(self, completion: str, task: Task) -> Score:
        raise AssertionError("never called")

    def verify_batch(self, completions: list[str], tasks: list[Task]) -> list[Score | Failure]:
        if "raise" in completions:
            raise ValueError("too much")
        if "leave" in completions:
            raise SystemExit(1)
        if "few" in completions:
            return []
        return [Score(float(len(completions)), True) for _ in completions]


def test_verifiers_that_wait_run_in_threads_side_by_side() -> None:
    verifier = InThreads()
    with VerifierPool(verifier, threads=8, thread_timeout=1.0) as pool:
        started = time.monotonic()
        results = check(pool, *[f"text {n}" for n in range(20)], "hang", "leave", "cannot", *["hang"] * 9)
        assert time.monotonic() - started < 25
        assert children_of(os.getpid()) == [] or not pool._drivers
    assert kinds(results) == ["score"] * 20 + ["timeout", "error", "error"] + ["timeout"] * 9
    assert [result.evidence for result in results if isinstance(result, Score)] == [f"text {n}" for n in range(20)]
    assert 4 <= verifier.most <= 20


def test_verifiers_of_batches() -> None:
    with VerifierPool({"a": AtOnce(), "b": Strange()}, workers=1) as pool:
        results = pool.verify(["x"] * 3 + ["yyyy"], [TASK] * 4, ["a", "a", "a", "b"])
        assert [reward_of(result) for result in results] == [3.0, 3.0, 3.0, 4.0]
        assert kinds(pool.verify(["raise", "x"], [TASK] * 2, "a")) == ["error", "error"]
        assert kinds(pool.verify(["few", "x"], [TASK] * 2, "a")) == ["error", "error"]
        begun = time.monotonic()
        assert kinds(pool.verify(["leave", "x"], [TASK] * 2, "a")) == ["error", "error"]
        assert time.monotonic() - begun < 60.0, "nobody waits for the time limit of threads"
