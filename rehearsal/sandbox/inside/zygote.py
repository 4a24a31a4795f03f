"""The process that is started once, stays clean, and forks a cell in milliseconds.

It never reads anything that a model wrote. Over its control socket come requests for cells, each with the socket over
which the host will talk to that cell; at the end of the control socket it leaves, and with it everything inside.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from rehearsal.sandbox.inside import libc, wall
from rehearsal.sandbox.inside.warden import Warden

LARGEST_REQUEST = 1 << 16
_SECONDS_BETWEEN_LOOKS = 1.0


def main(descriptor: int) -> None:
    """Build the outer wall, tell the host, and serve.

    The first message is JSON with ``nested`` (cells have walls), ``enclose`` (build the outer wall), ``become`` (user
    to be, or null), ``landlock``, ``readable`` (paths), ``scratch`` (folder that holds a cell's files), ``packages``
    (folders of importable packages) and ``preload`` (modules). The answer is an empty object, or ``failed`` with why.

    Args:
        descriptor: of the control socket.
    """
    control = socket.socket(fileno=descriptor)
    settings = json.loads(control.recv(LARGEST_REQUEST))
    try:
        _prepare(settings)
    except Exception as error:
        control.send(json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        raise SystemExit(1) from error
    control.send(b"{}")
    _serve(control, settings)


def _prepare(settings: dict[str, Any]) -> None:
    if settings["enclose"]:
        wall.enclose(settings["readable"], settings["scratch"], privileged=settings["become"] is not None)
    if settings["become"] is not None:
        wall.become(settings["become"])
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    os.umask(0o077)
    sys.path += settings["packages"]
    for name in settings["preload"]:
        importlib.import_module(name)
    # Isolated mode leaves out the module that defines them, and programs use them.
    sitebuiltins = importlib.import_module("_sitebuiltins")
    for name in ("exit", "quit"):
        setattr(builtins, name, sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    gc.collect()
    gc.freeze()  # a collection in a cell would otherwise write to, and so copy, every page of the modules


def _serve(control: socket.socket, settings: dict[str, Any]) -> None:
    while True:
        if select.select([control], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
            request, descriptors, _, _ = socket.recv_fds(control, LARGEST_REQUEST, 1)
            if not request:
                break
            try:
                child = os.fork()
            except OSError as error:
                # No more processes for now: that costs this cell, whose socket ends, and none of the others.
                os.write(2, f"a cell was not made: {error}\n".encode())
                child = -1
            if child == 0:
                control.close()
                _cell(json.loads(request), socket.socket(fileno=descriptors[0]), settings)
            for descriptor in descriptors:
                os.close(descriptor)
        _reap()
    if not settings["nested"]:
        _end_all_below()


def _cell(limits: dict[str, Any], host: socket.socket, settings: dict[str, Any]) -> None:
    """What a fork does; it does not return."""
    status = 1
    try:
        if settings["nested"]:
            wall.enclose_cell(settings["scratch"], limits["file_bytes"])
        Warden(host, limits, settings).serve()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the host is gone
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"a cell ended: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _end_all_below() -> None:
    """Without a namespace of processes nothing ends by itself: wait for the wardens, then see to what they left."""
    from rehearsal.sandbox.inside.processes import kill_below

    deadline = _SECONDS_BETWEEN_LOOKS
    signal.alarm(10)
    while deadline > 0:
        _reap()
        select.select([], [], [], 0.02)
        deadline -= 0.02
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
    kill_below(os.getpid())
