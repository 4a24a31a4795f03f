"""What runs the text that a model wrote. From here on nothing in this process can be trusted.

A guest speaks to its warden through two pipes. Whatever it writes there is about its own call and believed no further:
model code can find the pipes and lie, and has then lied about its own output. At a service there is no warden, and
:mod:`replay` makes the calls with the functions from here.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import functools
import linecache
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, cast

from rehearsal.sandbox.inside import plain
from rehearsal.sandbox.inside.framing import Message, pack, read_message, write_all

PROGRAM = "program.py"
LARGEST_VALUE = 1 << 22
"""Bytes of what a call answers."""
_LONGEST_ERROR = 8000
"""Characters of a traceback; of a longer one the middle is left out."""


def make_home(folder: str) -> None:
    """Make a folder the home and the working folder, in an environment that holds nothing of the host's."""
    os.environ.clear()
    os.environ.update(
        {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "USER": "guest"}
    )
    os.chdir(folder)
    sys.argv = [""]
    sys.orig_argv = [""]
    sys.path.insert(0, folder)


# --- a program --------------------------------------------------------------------------------------------------------


def program(source: str, results: int) -> None:
    """Run source as Python runs a script, and end this process as Python would."""
    sys.argv = [PROGRAM]
    main = _fresh_main(PROGRAM)
    _remember(PROGRAM, source)
    status = 0
    try:
        exec(compile(source, PROGRAM, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as leaving:
        status = _exit_status(leaving)
    except BaseException as error:
        status = 1
        with_kind = pack({"n": 0, "kind": type(error).__name__})
        print(_shown(error, PROGRAM), file=sys.stderr)
        write_all(results, with_kind)
    try:
        cast(Any, threading)._shutdown()
        cast(Any, atexit)._run_exitfuncs()
    finally:
        flush()
        os._exit(status)


def _exit_status(leaving: SystemExit) -> int:
    code = leaving.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


# --- an interpreter ---------------------------------------------------------------------------------------------------


def interpreter(requests: int, results: int) -> None:
    """Serve calls one after the other; names live on from call to call."""

    def exchange(text: str) -> Message:
        write_all(results, pack({"ask": text}))
        return read_message(requests) or {"error": "the host is gone"}

    main = begin(exchange)
    while (request := read_message(requests)) is not None:
        write_all(results, pack({"n": request["n"], **answered(request, main)}))


def begin(exchange: Callable[[str], Message]) -> types.ModuleType:
    """A fresh ``__main__`` for calls.

    Args:
        exchange: gets an answer to what code asks with ``host.ask(text)``: ``text``, or ``error``.
    """
    lock = threading.Lock()

    def ask(text: str) -> str:
        """Ask the host something, and wait for what it says."""
        if not isinstance(text, str):
            raise TypeError("only text can be asked")
        with lock:
            answer = exchange(text)
        if answer.get("error") is not None:
            raise RuntimeError(answer["error"])
        return str(answer["text"])

    host = types.ModuleType("host", "What the program that runs this interpreter offers to it.")
    host.ask = ask  # type: ignore[attr-defined]
    sys.modules["host"] = host
    return _fresh_main("<interpreter>")


def answered(request: Message, main: types.ModuleType, largest: int = LARGEST_VALUE) -> Message:
    """Make a call in ``main``; what came of it. Names live on there from call to call.

    Args:
        request: what the host sends.
        main: from :func:`begin`.
        largest: bytes of the value that a function may give.
    """
    own = os.getpid()
    try:
        work = _run if request["do"] == "run" else functools.partial(_call, largest=largest)
        answer: Message = {"error": None, "value": work(request, main)}
    except BaseException as error:
        answer = {"error": _shown(error, "<call"), "kind": type(error).__name__}
    flush()
    if os.getpid() != own:
        os._exit(0)  # a fork made by the model's code must not serve calls as well
    return answer


def _run(request: Message, main: types.ModuleType) -> None:
    """Run source; the value of a last expression is shown, as at a prompt."""
    name, source = f"<call {request['n']}>", request["source"]
    _remember(name, source)
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec", dont_inherit=True), main.__dict__)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), main.__dict__)
        if value is not None:
            print(repr(value))
            main.__dict__["_"] = value


def _call(request: Message, main: types.ModuleType, largest: int) -> Any:
    """Call a function by name. Answered are its result, its arguments as it left them, or what it raised."""
    function = main.__dict__.get(request["function"], getattr(builtins, request["function"], None))
    if function is None:
        raise NameError(f"name '{request['function']}' is not defined")
    positional, named = plain.decode(request["arguments"])
    try:
        result = function(*positional, **named)
        answer = {"result": plain.encode(result), "arguments": plain.encode([*positional, *named.values()])}
        if len(pack(answer)) > largest:
            raise plain.PlainError(f"a value of more than {largest} bytes")
        return answer
    except plain.PlainError as error:
        return {"unusable": str(error)}
    except BaseException as error:
        return {"raised": type(error).__name__, "said": _said(error), "error": _shown(error, "<call")}


# --- both -------------------------------------------------------------------------------------------------------------


def _fresh_main(file: str) -> types.ModuleType:
    main = types.ModuleType("__main__")
    main.__dict__.update({"__builtins__": builtins, "__file__": file})
    sys.modules["__main__"] = main
    # New ones, because those of the zygote know what its descriptors were.
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = os.fdopen(number, "w" if number else "r", buffering=1, **options)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return main


def _remember(name: str, source: str) -> None:
    """So that tracebacks can show lines."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)


def _said(error: BaseException) -> str:
    try:
        return str(error)[:_LONGEST_ERROR]
    except BaseException:
        return "an error that cannot be shown"


def _shown(error: BaseException, first: str) -> str:
    """The traceback from the first frame of the model's code on."""
    try:
        trace = error.__traceback__
        while trace is not None and not trace.tb_frame.f_code.co_filename.startswith(first):
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace, limit=-20)).rstrip()
    except BaseException:
        text = f"{type(error).__name__}: an error that cannot be shown"
    if len(text) > _LONGEST_ERROR:
        text = f"{text[: _LONGEST_ERROR // 2]}\n...\n{text[-_LONGEST_ERROR // 2 :]}"
    return text


def flush() -> None:
    """Write out what the streams of output hold."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # closed, replaced or broken by the model; what it had not written is lost
            continue
