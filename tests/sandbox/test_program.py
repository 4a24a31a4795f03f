"""Programs run once: input, files, output and status; and the levels of isolation themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rehearsal.sandbox.probing as probing
from rehearsal.errors import SandboxError
from rehearsal.sandbox import InterpreterPool, Isolation, Limits, Outcome, available, require, run_program, strongest
from rehearsal.usage import Account

ROOT = Path(__file__).resolve().parents[2]


def test_input_files_output_and_status(pool: InterpreterPool) -> None:
    source = "import sys\nfrom helper.words import word\nprint(input(), word, open('data.bin', 'rb').read())\n" \
             "print('e', file=sys.stderr)\nsys.exit(3)"  # fmt: skip
    files = {"helper/words.py": "word = 'hello'", "data.bin": b"\0\1"}
    result = pool.run_program(source, stdin="line\nmore", files=files)
    assert (result.stdout, result.stderr) == ("line hello b'\\x00\\x01'\n", "e\n")
    assert (result.outcome, result.exit_status) == (Outcome.RAISED, 3)
    assert result.isolation == pool.isolation.value


def test_a_program_runs_as_a_script(pool: InterpreterPool) -> None:
    source = (
        "import atexit, sys\natexit.register(print, 'bye')\nif __name__ == '__main__':\n    print(sys.argv, exit)\n"
    )
    result = pool.run_program(source)
    assert result.stdout == "['program.py'] Use exit() or Ctrl-D (i.e. EOF) to exit\nbye\n"
    assert (result.outcome, result.exit_status) == (Outcome.FINISHED, 0)


def test_an_uncaught_exception_is_named(pool: InterpreterPool) -> None:
    result = pool.run_program("def f():\n    raise KeyError('k')\nf()")
    assert (result.outcome, result.exit_status, result.error) == (Outcome.RAISED, 1, "KeyError")
    assert result.stderr.endswith("KeyError: 'k'\n") and "raise KeyError('k')" in result.stderr
    assert "guest.py" not in result.stderr


def test_unicode_and_lone_surrogates_survive(pool: InterpreterPool) -> None:
    assert pool.run_program("print(input())", stdin="žluťoučký 🐎\n").stdout == "žluťoučký 🐎\n"
    assert pool.run_program("print('\\ud800')").stdout == "\\ud800\n"


def test_output_is_cut_at_its_limit(pool: InterpreterPool) -> None:
    result = pool.run_program("print('x' * 100)", limits=Limits(output_bytes=10))
    assert (result.stdout, result.outcome) == ("x" * 10, Outcome.OUTPUT)


@pytest.mark.parametrize("name", ["/etc/passwd", "../out", "a/../../b", ""])
def test_files_stay_in_the_folder(pool: InterpreterPool, name: str) -> None:
    with pytest.raises(SandboxError, match="relative path"):
        pool.run_program("1", files={name: ""})


def test_files_have_a_limit(pool: InterpreterPool) -> None:
    with pytest.raises(SandboxError, match="limit of 4096"):
        pool.run_program("1", files={"big": bytes(5000)}, limits=Limits(file_bytes=4096))


def test_the_default_is_the_strongest_level() -> None:
    offered = [level for level, reason in available().items() if not reason]
    if not offered:
        with pytest.raises(SandboxError, match="safely"):
            strongest()
        return
    assert run_program("print(1)").isolation == strongest().value == max(offered).value
    for level in offered:
        assert run_program("print(1)", isolation=level.value).isolation == level.value


def test_levels_are_ordered() -> None:
    assert sorted({*Isolation}) == list(Isolation)
    assert Isolation.RLIMITS < Isolation.FILTERS < Isolation.NAMESPACES < Isolation.BUBBLEWRAP


@pytest.mark.parametrize("level", Isolation)
def test_below_the_level_that_is_asked_for_it_refuses(level: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = dict.fromkeys(Isolation, "the kernel says no")
    monkeypatch.setattr(probing, "available", lambda python=None: nothing)
    with pytest.raises(SandboxError, match=r"not to be had here \(the kernel says no\); .+, or ask for less\.$"):
        require(level)
    with pytest.raises(SandboxError, match="cannot be run safely"):
        require(None)
    with pytest.raises(SandboxError, match="no level of isolation 'strong'"):
        require("strong")


def test_bubblewrap_is_probed_and_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_found", {})
    monkeypatch.setattr(probing.shutil, "which", lambda name: None)
    assert available()[Isolation.BUBBLEWRAP] == "bwrap is not installed"


def test_a_python_that_is_none_is_refused() -> None:
    assert all("no Python" in reason for reason in available("/bin/true").values() if "installed" not in reason)


def test_a_script_that_ends_leaves_no_process(tmp_path: Path) -> None:
    """Also one that is killed: the zygote notices the end of its socket."""
    if not [reason for reason in available().values() if not reason]:
        pytest.skip("there is no sandbox here")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\nfrom rehearsal.sandbox import run, run_program\nrun_program('1')\n"
        "print(next(iter(run._zygotes.values()))._process.pid, flush=True)\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for how in ("ends", "killed"):
        done = subprocess.run([sys.executable, str(script), how], cwd=ROOT, capture_output=True, text=True, check=False,
                              env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})  # fmt: skip
        assert done.stdout, done.stderr
        from pools import eventually, is_zombie

        assert eventually(lambda pid=int(done.stdout): is_zombie(pid)), how


def test_what_runs_is_counted_by_its_level_and_looking_around_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_found", {})
    account = Account()
    level = strongest()
    assert account.take() == {}, "a level that was only tried out was not used"
    run_program("print(1)", isolation=level)
    with InterpreterPool(1, isolation=level, spare=1) as pool:
        assert account.take() == {f"sandbox/{level.value}": 1}
        pool.run_program("print(1)")
        with pool.interpreter() as it:
            it.run("def f(): return 1")
            it.call("f")
    assert account.take() == {f"sandbox/{level.value}": 3}
