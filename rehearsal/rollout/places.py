"""Environments and the threads that they live in, and coroutines run to their end."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rehearsal.environments.base import TextEnv

T = TypeVar("T")


class HungError(Exception):
    """The environment did not answer in time, which was so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no answer in {seconds:g} s")
        self.seconds = seconds


class CarriedError(Exception):
    """Carries what somebody else's code has raised."""

    def __init__(self, raised: BaseException) -> None:
        super().__init__(str(raised))
        self.raised = raised


class OddError(CarriedError):
    """Carries what a coroutine or a future cannot: StopIteration, SystemExit and their like."""


def _contained(function: Callable[[], T]) -> T:
    """Call code of an environment; whatever it raises belongs to its episode, except Ctrl-C."""
    try:
        return function()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            raise
        raise OddError(error) from error


class _EnvironmentThread:
    """Runs the calls of one environment in a daemon thread, which can be left behind if a call never returns.

    Args:
        at_end: what the thread does last.
    """

    def __init__(self, at_end: Callable[[], None]) -> None:
        self._at_end = at_end
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], asyncio.AbstractEventLoop, asyncio.Future[Any]] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="rehearsal-environment")
        self._thread.start()

    def _serve(self) -> None:
        while (job := self._calls.get()) is not None:
            call, loop, future = job
            result, error = None, None
            try:
                result = _contained(call)
            except Exception as caught:
                error = caught
            except KeyboardInterrupt as caught:  # the user's own Ctrl-C arrives in the main thread
                error = OddError(caught)
            try:
                loop.call_soon_threadsafe(_resolve, future, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                break
        self._at_end()

    async def call(self, function: Callable[[], T], timeout: float) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.put((function, loop, future))
        try:
            return await asyncio.wait_for(future, timeout)
        except TimeoutError as error:
            if future.done() and not future.cancelled():
                raise  # the environment itself raised it
            raise HungError(timeout) from error

    def stop(self) -> None:
        """End it once its present call, if there is one, has returned."""
        self._calls.put(None)

    def dismiss(self) -> None:
        """End it without what it does last; no call is under way."""
        self._at_end = lambda: None
        self.stop()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)


def _resolve(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class Place:
    """One environment and, if it or one of its agent's tools is not fast, its thread, in which it is made too: a
    constructor may be slow, hang or raise as well as a step.

    Args:
        make: makes the environment.
        threaded: whether it gets a thread.
    """

    def __init__(self, make: Callable[[], TextEnv], threaded: bool) -> None:
        self._make = make
        self._made: TextEnv | None = None
        self.thread = _EnvironmentThread(self._close_env) if threaded else None

    @property
    def env(self) -> TextEnv:
        """The environment, once there is one."""
        assert self._made is not None
        return self._made

    @property
    def empty(self) -> bool:
        """Whether the environment is still to be made."""
        return self._made is None

    def fill(self) -> TextEnv:
        """Make the environment; to be given to :meth:`call`."""
        self._made = self._make()
        return self._made

    async def call(self, function: Callable[[], T], timeout: float) -> T:
        if self.thread is None:
            return _contained(function)
        return await self.thread.call(function, timeout)

    def settle(self) -> None:
        """Do without the thread from now on."""
        if self.thread is not None:
            self.thread.dismiss()
            self.thread = None

    def close(self) -> None:
        """Let go of the environment without waiting for it."""
        if self.thread is None:
            self._close_env()
        else:
            self.thread.stop()

    def _close_env(self) -> None:
        if self._made is not None:
            # Its episodes are over: what it has to say now changes nothing.
            with contextlib.suppress(Exception):
                self._made.close()


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, side by side. Once one of them raises, the others are cancelled and have ended before that
    is heard of."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where an event loop is running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(coroutine)
    with ThreadPoolExecutor(1, thread_name_prefix="rehearsal-rollout") as pool:
        return pool.submit(_run, coroutine).result()


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    # asyncio.run, setting its handler for Ctrl-C back, writes out the result of the main task as text and throws that
    # away; for a batch of episodes it takes a second. So the main task returns nothing.
    box: list[T] = []

    async def main() -> None:
        box.append(await coroutine)

    asyncio.run(main())
    return box[0]
