"""Persistent interpreters: state, values, questions, limits, and a pool that leaks nothing and survives its zygote."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rehearsal.errors import SandboxError
from rehearsal.sandbox import InterpreterPool, Isolation, Limits, Outcome
from rehearsal.sandbox.inside import zygote
from rehearsal.sandbox.zygote import Zygote

sys.path.insert(0, str(Path(__file__).parent))

from pools import MIB, SMALL, below, eventually, idle_processes, python_for


@pytest.fixture
def own_pool() -> InterpreterPool:
    """A pool at the strongest level, for a test that breaks it."""
    level = next((level for level in reversed(Isolation) if _is_to_be_had(level)), None)
    if level is None:
        pytest.skip("there is no sandbox here")
    with InterpreterPool(4, limits=SMALL, isolation=level, python=python_for(level)) as made:
        yield made


def _is_to_be_had(level: Isolation) -> bool:
    try:
        python_for(level)
    except pytest.skip.Exception:
        return False
    return True


def test_state_lives_on_and_a_last_value_is_shown(pool: InterpreterPool) -> None:
    with pool.interpreter() as it:
        assert it.run("x = 20\ndef double(n):\n    return 2 * n").output == ""
        result = it.run("double(x) + 2")
        assert (result.output, result.error, result.outcome) == ("42\n", None, Outcome.FINISHED)
        assert result.isolation == pool.isolation.value
        assert it.run("_ + 1").output == "43\n"
        assert it.run("None").output == ""
        assert it.run("print('a'); 'b'").output == "a\n'b'\n"
        assert it.run("import sys; print('e', file=sys.stderr); print('o')").output == "e\no\n"
        assert it.calls == 6


def test_an_error_shows_the_code_and_nothing_of_the_sandbox(pool: InterpreterPool) -> None:
    with pool.interpreter() as it:
        it.run("x = 1")
        result = it.run("def f():\n    return 1 / 0\nf()")
        assert result.outcome is Outcome.RAISED
        assert result.error is not None
        assert result.error.startswith("Traceback") and result.error.endswith("ZeroDivisionError: division by zero")
        assert "return 1 / 0" in result.error
        assert "guest.py" not in result.error
        assert it.run("x").output == "1\n"
        assert "SyntaxError" in (it.run("def").error or "")


def test_a_call_beyond_its_time_loses_the_state_and_the_next_one_says_so(pool: InterpreterPool) -> None:
    with pool.interpreter() as it:
        it.run("x = 1")
        late = it.run("print('begun')\nwhile True: pass", seconds=0.5)
        assert late.outcome is Outcome.TIMEOUT
        assert late.output == "begun\n"
        assert "time was over" in (late.error or "")
        assert 0.4 < late.seconds < 20
        assert not late.state_lost
        after = it.run("x")
        assert after.state_lost
        assert "NameError" in (after.error or "")
        assert not it.run("1").state_lost
        assert it.losses == 1


def test_nothing_runs_on_between_calls(pool: InterpreterPool) -> None:
    with pool.interpreter() as it:
        it.run(
            "import threading, time\nn = 0\ndef count():\n    global n\n    while True:\n        n += 1\n"
            "        time.sleep(0.001)\nthreading.Thread(target=count, daemon=True).start()"
        )
        gaps = []
        for _ in range(3):  # it counts during the calls, which may take long on a busy machine
            before = int(it.run("n").output)
            time.sleep(0.5)
            gaps.append(int(it.run("n").output) - before)
        assert min(gaps) < 200


def test_a_function_is_called_with_plain_values(pool: InterpreterPool) -> None:
    with pool.interpreter() as it:
        it.run("def add(a, b=1):\n    a.append(b)\n    return {'sum': sum(a), 'pair': (a, {b})}")
        said = it.call("add", [[1, 2]], {"b": 3})
        assert said.value == {"result": {"sum": 6, "pair": ([1, 2, 3], {3})}, "arguments": [[1, 2, 3], 3]}
        it.run("def fail(): raise ValueError('no')\ndef strange(): return object()")
        it.run("class Always:\n    def __eq__(self, other): return True")
        it.run("class Liar(int):\n    def __eq__(self, other): return True")
        said = it.call("fail")
        assert said.value is not None
        assert (said.value["raised"], said.value["said"]) == ("ValueError", "no")
        assert it.call("strange").value == {"unusable": "a value of type object"}
        assert it.call("Always").value == {"unusable": "a value of type Always"}
        liar = it.call("Liar", [7]).value
        assert liar is not None and type(liar["result"]) is int and liar["result"] == 7
        assert "NameError" in (it.call("missing").error or "")
        with pytest.raises(SandboxError, match="plain data"):
            it.call("add", [lambda: None])


def test_code_asks_the_host(pool: InterpreterPool) -> None:
    with pool.interpreter() as it:
        result = it.run("import host\nhost.ask('a') + host.ask('b')", answer=str.upper)
        assert result.output == "'AB'\n"
        assert "nobody answers" in (it.run("host.ask('a')").error or "")

        def fails(question: str) -> str:
            raise LookupError(question)

        with pytest.raises(LookupError):
            it.run("host.ask('c')", answer=fails)
        assert it.run("1").state_lost


def test_no_interpreter_sees_what_another_left(pool: InterpreterPool) -> None:
    with pool.interpreter() as one, pool.interpreter() as two:
        one.run("secret = 'left by one'\nopen('left', 'w').write(secret)\nimport random; a = random.random()")
        look = two.run("import os, random; print(os.listdir('.'), 'secret' in globals()); random.random()")
        assert look.output.startswith("[] False\n")
        assert one.run("a").output not in look.output, "both draw the same random numbers"
        assert one.run("open('left').read()").output == "'left by one'\n"


def test_32_at_once(pool: InterpreterPool) -> None:
    def episode(number: int) -> str:
        with pool.interpreter() as it:
            it.run(f"x = {number}")
            it.run("y = x * 2")
            return it.run("print(x, y)").output

    with ThreadPoolExecutor(32) as threads:
        assert list(threads.map(episode, range(64))) == [f"{n} {2 * n}\n" for n in range(64)]
    assert eventually(lambda: below(pool) == idle_processes(pool))


def test_a_pool_has_a_size_and_an_end(own_pool: InterpreterPool) -> None:
    taken = [own_pool.take() for _ in range(4)]
    with pytest.raises(SandboxError, match="free"):
        own_pool.take(timeout=0.05)
    threading.Timer(0.2, taken[0].close).start()
    assert own_pool.take(timeout=60).run("1").output == "1\n"
    with pytest.raises(SandboxError, match="given back"):
        taken[0].run("1")
    taken[0].close()
    own_pool.close()
    with pytest.raises(SandboxError, match="closed"):
        taken[1]._pool._new_cell()


def test_a_zygote_that_is_killed_from_outside_is_replaced(own_pool: InterpreterPool) -> None:
    with own_pool.interpreter() as it:
        it.run("x = 1")
        timer = threading.Timer(0.3, os.killpg, (own_pool._zygote._process.pid, signal.SIGKILL))
        timer.start()
        result = it.run("import time\ntime.sleep(3)\n'slept'")
        timer.join()
        if own_pool.isolation >= Isolation.NAMESPACES:
            assert result.outcome is Outcome.GONE
            # What is around the zygote may end a moment later.
            assert eventually(lambda: not own_pool._zygote.alive)
            after = it.run("'again'")
            assert after.output == "'again'\n"
            assert after.state_lost
        with own_pool.interpreter() as other:
            assert other.run("2").output == "2\n"
        assert own_pool.restarts == 1


def test_a_zygote_that_ends_as_it_is_asked_is_replaced(own_pool: InterpreterPool) -> None:
    """The process around it may live a little longer: it is asked, and cannot answer."""
    while own_pool._spare:
        own_pool._spare.pop().close()
    own_pool._zygote._control.close()
    with own_pool.interpreter() as it:
        assert it.run("1").output == "1\n"
    assert own_pool.restarts == 1


def test_a_zygote_ends_although_what_is_around_it_was_killed_alone(own_pool: InterpreterPool) -> None:
    """It may be stuck where it cannot see that its host is gone, as a process is that is stopped."""
    around = own_pool._zygote._process.pid
    inside = below(own_pool)
    if own_pool.isolation < Isolation.NAMESPACES:
        pytest.skip("there is nothing around it")
    for pid in inside:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    os.kill(around, signal.SIGKILL)
    own_pool.close()
    try:
        assert eventually(lambda: not any(_is_alive(pid) for pid in inside))
    finally:
        for pid in inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_start_that_is_killed_from_outside_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the other end of the socket may live on, and never say a word."""
    began, groups = subprocess.Popen, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        process = began(["sh", "-c", "sleep 600 & wait"], **kwargs)
        groups.append(process.pid)
        threading.Timer(0.3, process.kill).start()
        return process

    monkeypatch.setattr("rehearsal.sandbox.zygote.subprocess.Popen", killed)
    begun = time.monotonic()
    with pytest.raises(SandboxError, match="did not start: it was ended from outside"):
        Zygote(Isolation.NAMESPACES)
    assert time.monotonic() - begun < 20
    assert len(groups) == 1
    assert eventually(lambda: not _of_group(groups[0])), "whoever held the other end lives on"


def _stat(pid: int | str) -> tuple[str, int]:
    """State and process group; that of a dead one where there is none."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return "Z", 0
    return state, int(group)


def _is_alive(pid: int) -> bool:
    return _stat(pid)[0] != "Z"


def _of_group(group: int) -> list[str]:
    """Processes of a group that live."""
    found = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in found if _stat(pid)[1] == group and _stat(pid)[0] != "Z"]


def test_spare_interpreters_that_cannot_be_had_harm_nobody(
    own_pool: InterpreterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one that waits is good, although the zygote cannot make others any more."""
    with own_pool.interpreter() as first:
        assert first.run("1").output == "1\n"
        monkeypatch.setattr(own_pool, "_started", _refuse)
        with own_pool.interpreter() as it:
            assert it.run("2").output == "2\n"
        monkeypatch.undo()
        assert first.run("3").output == "3\n"


def _refuse() -> None:
    raise SandboxError("no cell")


def test_a_fork_that_fails_costs_one_cell_and_not_the_zygote(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A system may be short of processes for a moment; all interpreters would end with their zygote."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    host, cell = socket.socketpair()
    with ours, its, host:
        socket.send_fds(ours, [b"{}"], [cell.fileno()])
        cell.close()
        ours.shutdown(socket.SHUT_WR)

        def no_fork() -> int:
            raise BlockingIOError("Resource temporarily unavailable")

        monkeypatch.setattr(os, "fork", no_fork)
        zygote._serve(its, {"nested": True})
        host.settimeout(5)
        assert host.recv(1) == b"", "the host finds the end of the cell at once"
    assert "a cell was not made" in capfd.readouterr().err


def test_interpreters_that_died_while_they_waited_are_not_handed_out(own_pool: InterpreterPool) -> None:
    with InterpreterPool(4, isolation=own_pool.isolation, python=python_for(own_pool.isolation), spare=3) as pool:
        assert eventually(lambda: len(below(pool) - idle_processes(pool)) >= 6)
        for pid in below(pool) - idle_processes(pool):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not any(cell.alive for cell in pool._spare))
        for _ in range(4):
            with pool.interpreter() as it:
                assert it.run("1 + 1").output == "2\n"
        assert pool.restarts == 0


def test_the_clock_of_the_host_ends_a_call_whose_warden_does_not(
    own_pool: InterpreterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rehearsal.sandbox.cell.SECONDS_OF_GRACE", 0.5)
    with own_pool.interpreter() as it:
        it.run("1")
        stopped = sorted(below(own_pool) - idle_processes(own_pool))
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        result = it.run("2", seconds=0.2)
        assert result.outcome is Outcome.GONE
        assert result.seconds < 20
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):  # some are ended already
                os.kill(pid, signal.SIGCONT)
        assert it.run("3").output == "3\n"


def test_packages_can_be_lent(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("packages")
    (folder / "lent.py").write_text("VALUE = 7\n")
    for place in (folder, *list(folder.parents)[:2]):
        place.chmod(0o755)
    level = next((level for level in reversed(Isolation) if _is_to_be_had(level)), None)
    if level is None:
        pytest.skip("there is no sandbox here")
    with InterpreterPool(1, isolation=level, packages=[folder], preload=["lent"], python=python_for(level)) as pool:
        assert pool.take().run("import lent, sys\nlent.VALUE").output == "7\n"
    with pytest.raises(SandboxError, match="no folder"):
        InterpreterPool(1, isolation=level, packages=[folder / "missing"], python=python_for(level))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seconds": 0}, "time limit"), ({"seconds": float("inf")}, "time limit"),
        ({"memory_bytes": 10}, "memory_bytes"),
        ({"processes": 0}, "processes"), ({"files": 1}, "files"), ({"output_bytes": 0.5}, "output_bytes"),
    ],
)  # fmt: skip
def test_limits_are_checked(changes: dict[str, float], word: str) -> None:
    with pytest.raises(SandboxError, match=word):
        Limits(**changes)  # type: ignore[arg-type]


def test_a_limit_on_memory_is_beyond_the_bare_interpreter(pool: InterpreterPool) -> None:
    with pool.interpreter() as it:
        assert it.run(f"x = bytearray({100 * MIB}); len(x)").output == f"{100 * MIB}\n"
        assert it.run(f"y = bytearray({100 * MIB})").outcome is Outcome.MEMORY


def test_no_file_stays_behind_a_closed_folder(pool: InterpreterPool) -> None:
    with pool.interpreter() as episode:
        assert episode.run("import os\nos.makedirs('a/b'); open('a/b/c', 'w').close()\nos.chmod('a', 0)").error is None
    scratch = pool._zygote._scratch
    assert not scratch or eventually(lambda: os.listdir(scratch) == [])


def test_what_programs_do_every_day_is_not_kept_from_them(pool: InterpreterPool) -> None:
    with pool.interpreter() as episode:
        result = episode.run(
            "import asyncio, multiprocessing, shutil, subprocess\n"
            "open('a', 'w').write('x')\n"
            "shutil.copy2('a', 'b'); shutil.copytree('.', 'c')\n"
            "one, other = multiprocessing.Pipe()\n"
            "one.send(asyncio.run(asyncio.sleep(0, 'slept')))\n"
            "open('b').read() + open('c/b').read(), other.recv()"
        )
    assert result.output == "('xx', 'slept')\n", result


def test_stop_signals_to_every_process_are_for_the_host(own_pool: InterpreterPool) -> None:
    """systemd and SLURM signal all that they find; the host then still wants to end its step. A guest takes signals."""
    zygote_before = own_pool._zygote
    with own_pool.interpreter() as signalled:
        mask = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [])"
        assert signalled.run(mask).output == "set()\n"
        for number in (signal.SIGINT, signal.SIGTERM):
            for pid in below(own_pool) | {own_pool._zygote._process.pid}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        with own_pool.interpreter() as another:
            for it in (signalled, another):
                it.run("1")  # its guest has ended, one that was kept ready too, and it gets another
                assert it.run("2").output == "2\n"
    assert own_pool._zygote is zygote_before
    assert zygote_before.alive
