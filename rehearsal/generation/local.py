"""The local engine: continuous batching over a Hugging Face model, in this process.

One step reads one token of every sampling episode and whatever new text the others brought, packed without padding.
Each episode keeps its keys and values across turns, an episode that ends frees its place at once, and whoever waits
takes it in the same step.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rehearsal.errors import GenerationError
from rehearsal.generation.blocks import Block, BlockRunner, Drawn, Run, Streams, common_tokens, cut_blocks
from rehearsal.generation.cache import KeyValuePool, ShapeProbe
from rehearsal.generation.local_session import LocalSession
from rehearsal.generation.places import Places
from rehearsal.generation.sampling import SamplingParams
from rehearsal.generation.session import EngineStats
from rehearsal.generation.weights import WeightWatch
from rehearsal.models.adapters import active_adapters, adapter_parameters
from rehearsal.models.packed import causal_lm, packed_attention, packed_hidden
from rehearsal.trajectory import SampleStop

_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", ("/sys/fs/cgroup/memory.stat", "inactive_file")),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ("/sys/fs/cgroup/memory/memory.stat", "total_inactive_file"),
    ),
)  # fmt: skip
"""Files with the limit of a container, with what it uses, and with how much of that are cached files."""

_LEAST_READ, _LEAST_SHARE = 8192, 0.2
"""The fewest tokens, over all places of a block, and the least part of the longest of their contexts, that are worth
reading once for all: to put the two parts of the scores together costs as well."""


def free_memory(device: torch.device) -> int:
    """Bytes that a program can have on a device now, within the limit of its container; 2 GiB where the system does not
    tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = []
    with contextlib.suppress(ValueError, OSError, KeyError):
        # What holds cached files counts: the system gives it back when it is asked for.
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) << 10)
    for most, used, cached in _CONTAINER:
        with contextlib.suppress(ValueError, OSError, KeyError):
            cache = dict(line.split() for line in Path(cached[0]).read_text().splitlines())[cached[1]]
            free.append(int(Path(most).read_text()) - int(Path(used).read_text()) + int(cache))
    if not free:
        with contextlib.suppress(ValueError, OSError):
            free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free, default=2 << 30))


class LocalEngine:
    """Samples from ``model`` for many sessions at once.

    Args:
        model: a Hugging Face decoder-only causal LM, bare or wrapped by PEFT. Its present weights are used.
        max_context: the most tokens of one session.
        max_sessions: the most places; fewer are made if the memory does not suffice.
        memory_bytes: budget for keys and values; a quarter of the memory that is free now if None.
        prefill_tokens: the most tokens of new text that one forward pass reads.

    Raises:
        GenerationError: if not even one session fits into the budget.
    """

    gives_logprobs = True

    def __init__(
        self, model: Any, *, max_context: int = 2048, max_sessions: int = 256, memory_bytes: int | None = None,
        prefill_tokens: int = 4096,
    ) -> None:  # fmt: skip
        self.model = model
        self.max_context = int(max_context)
        self.stats = EngineStats()
        self._device = next(causal_lm(model).parameters()).device
        self._prefill_tokens = prefill_tokens
        limit = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and max_context > limit:
            raise GenerationError(f"max_context is {max_context}, but this model has {limit} positions; lower it.")
        shapes = self._probe()
        self.bytes_per_token = sum(shape.bytes_per_token for shape in shapes.values())
        budget = free_memory(self._device) // 4 if memory_bytes is None else int(memory_bytes)
        per_session = self.bytes_per_token * self.max_context
        self.capacity = min(max_sessions, budget // per_session)
        if self.capacity < 1:
            raise GenerationError(
                f"The keys and values of one episode of {max_context} tokens take {per_session / 2**20:.1f} MiB, and "
                f"the budget is {budget / 2**20:.1f} MiB; lower max_context or raise the memory budget."
            )
        self.cache_bytes = self.capacity * per_session
        self._pool = KeyValuePool(shapes, self.capacity, self.max_context, self._device)
        S, L = self.capacity, self.max_context
        self._places: Places[LocalSession] = Places(self._pool, S)
        # State of the sampling places, as arrays, so that a step costs no Python per episode.
        self._active = np.zeros(S, dtype=bool)
        self._length = np.zeros(S, dtype=np.int64)
        self._computed = np.zeros(S, dtype=np.int64)
        self._limit = np.zeros(S, dtype=np.int64)
        self._keys = np.zeros(S, dtype=np.uint64)
        self._params_index = np.zeros(S, dtype=np.int64)
        self._adapters_index = np.zeros(S, dtype=np.int64)
        self._adapters: list[tuple[str, ...] | None] = [None]
        self._last_ids = np.zeros(S, dtype=np.int64)
        self._token_ids = np.zeros((S, L), dtype=np.int32)
        self._new_logprobs = np.zeros((S, L), dtype=np.float32)
        self._params: list[SamplingParams] = []
        self._stops: list[np.ndarray] = []
        self._watch = WeightWatch(model)
        self._waiting: deque[LocalSession] = deque()
        self._runner: asyncio.Task[None] | None = None
        self._clock = 0

    def session(self, key: int, adapters: Sequence[str] | None = None) -> LocalSession:
        """A new session.

        Args:
            key: its stream of noise.
            adapters: those that it plays with, so that agents with adapters of their own can share a base and an
                engine; whatever is active in the model if None. Its forks have the same.

        Raises:
            ModelError: if there is no such adapter.
        """
        for name in adapters or ():
            adapter_parameters(self.model, name)  # raises
        return LocalSession(self, key, None if adapters is None else tuple(adapters))

    @property
    def free_places(self) -> int:
        return self.capacity - len(self._places)

    def reset_stats(self) -> None:
        self.stats = EngineStats()

    def describe(self) -> str:
        """One line on the memory that the engine holds."""
        return (
            f"{self.capacity} episodes of up to {self.max_context} tokens at once, "
            f"{self.cache_bytes / 2**20:.0f} MiB for keys and values at most"
        )

    @torch.no_grad()
    def _probe(self) -> dict[int, Any]:
        probe = ShapeProbe()
        with packed_attention(self.model):
            zero = torch.zeros(1, dtype=torch.long, device=self._device)
            packed_hidden(self.model, zero, zero, probe)
        return probe.shapes

    # What sessions ask for

    def submit(self, session: LocalSession) -> None:
        """Sample for a session, which waits for it."""
        self._clock += 1
        session.last_used = self._clock
        if session.slot >= 0:
            self._activate(session)
        else:
            self._waiting.append(session)
        loop = asyncio.get_running_loop()
        # A loop that was closed in the middle of a step left a runner behind that will never go on.
        if self._runner is None or self._runner.done() or self._runner.get_loop() is not loop:
            self._runner = loop.create_task(self._run())

    def withdraw(self, session: LocalSession) -> None:
        """Stop sampling for a session; it keeps its place and what is computed of its context."""
        with contextlib.suppress(ValueError):
            self._waiting.remove(session)
        if session.slot < 0:
            return
        self._active[session.slot] = False
        # At least the last token is computed again: its output is what the next draw needs.
        session.computed = self._computed[session.slot] = min(int(self._computed[session.slot]), session.length - 1)
        self._places.interrupted(session)

    def share(self, parent: LocalSession, child: LocalSession) -> None:
        """Let a fork take over its parent's keys and values."""
        self._places.share(parent, child)

    def release(self, session: LocalSession) -> None:
        """Free what a session holds; it is closed."""
        if session.slot >= 0:
            self._active[session.slot] = False
        self._places.release(session)
        with contextlib.suppress(ValueError):
            self._waiting.remove(session)
        session.fail(GenerationError("The session was closed while it was sampling."))

    # Places

    def _activate(self, session: LocalSession) -> None:
        assert session.params is not None
        slot = session.slot
        # Rows that differ in nothing but their budget of tokens are drawn together.
        distribution = replace(session.params, max_tokens=1)
        if distribution not in self._params:
            self._params.append(distribution)
            self._stops.append(np.array(distribution.stop_token_ids, dtype=np.int64))
        self._params_index[slot] = self._params.index(distribution)
        if session.adapters not in self._adapters:
            self._adapters.append(session.adapters)
        self._adapters_index[slot] = self._adapters.index(session.adapters)
        self._length[slot] = session.length
        self._computed[slot] = session.computed
        self._limit[slot] = min(session.length + session.params.max_tokens, self.max_context)
        self._keys[slot] = np.uint64(session.key)
        self._token_ids[slot, : session.length] = session.token_ids[: session.length]
        self._last_ids[slot] = session.token_ids[session.length - 1]
        self._active[slot] = True

    def _admit(self) -> None:
        postponed: list[LocalSession] = []
        while self._waiting:
            if self._places.full and not self._evict():
                break
            session = self._waiting.popleft()
            taken_over = self._places.take(session)
            if taken_over is None:
                postponed.append(session)
                continue
            self.stats.tokens_shared += taken_over
            self.stats.peak_sessions = max(self.stats.peak_sessions, len(self._places))
            self._activate(session)
        self._waiting.extendleft(reversed(postponed))

    def _evict(self) -> bool:
        """Take the place of an episode that waits for its environment, but only if nothing could run otherwise."""
        if self._active.any():
            return False
        idle = min(self._places, key=lambda session: session.last_used, default=None)
        if idle is None:
            return False
        self._places.leave(idle)
        self.stats.evictions += 1
        return True

    # Steps

    async def _run(self) -> None:
        started = time.perf_counter()
        threads = torch.get_num_threads()
        runner = BlockRunner(self.model, self._pool, self._device, self._watch)
        try:
            if runner.narrow:
                torch.set_num_threads(1)
            causal_lm(self.model).eval()
            while self._active.any() or self._waiting:
                # Whoever else runs on this loop, another engine for one, must not see these settings.
                with packed_attention(self.model), torch.inference_mode():
                    self._admit()
                    self._step(runner)
                # Those whose turn is done act now, and their next request joins the next step.
                await asyncio.sleep(0)
        except BaseException as error:
            told = self._fail(error if isinstance(error, Exception) else GenerationError("Sampling was interrupted."))
            # An error that its callers have is not raised again: nobody awaits this task.
            if not told or not isinstance(error, Exception):
                raise
        finally:
            torch.set_num_threads(threads)
            self.stats.seconds += time.perf_counter() - started

    def _fail(self, error: Exception) -> bool:
        """Hand an error to everyone who is sampling; whether there was anyone. The engine can be used again."""
        told = False
        for session in (*self._waiting, *self._places):
            told |= session.fail(error)
            self.withdraw(session)
        return told

    def _step(self, runner: BlockRunner) -> None:
        slots = np.nonzero(self._active)[0]
        kinds = self._adapters_index[slots]
        for kind in np.unique(kinds):
            with active_adapters(self.model, self._adapters[kind]):
                self._read(runner, slots[kinds == kind])

    def _read(self, runner: BlockRunner, slots: np.ndarray) -> None:
        new = self._length[slots] - self._computed[slots]
        single = slots[new == 1]
        runs: list[Run] = []
        budget = self._prefill_tokens
        for slot in slots[new > 1].tolist():
            first, length = int(self._computed[slot]), int(self._length[slot])
            last = min(length, first + budget)
            if last > first:
                runs.append(Run(slot, first, self._places[slot].token_ids[first:last], last == length))
                budget -= last - first
        read = (single, self._computed[single], self._last_ids[single])
        blocks = cut_blocks(*read, runs) if runner.narrow else [Block(*read, runs)]
        for block in blocks:
            block.shared = self._shared(block)
        streams = Streams(self._keys, self._length, self._params_index, self._params)
        results = runner.run(blocks, streams)
        self.stats.forwards += 1
        self.stats.tokens_prefilled += sum(len(run.token_ids) for run in runs)
        self._computed[single] += 1
        for run in runs:
            session = self._places[run.slot]
            session.computed = self._computed[run.slot] = run.first + len(run.token_ids)
            self._places.filled(session)
        for drawn in results:
            self._append(drawn)

    def _shared(self, block: Block) -> int:
        """How many of the first tokens of a block's places are read once for all. Nothing but what the places hold now
        decides it, so that a run that is resumed samples what it would have sampled."""
        if len(block.slots) < 2 or not self._pool.alike(block.slots):
            return 0
        shared = common_tokens(self._token_ids, block.slots, int(block.positions.min()))
        worth = shared * len(block.slots) >= _LEAST_READ and shared >= _LEAST_SHARE * int(block.positions.max())
        return shared if worth else 0

    def _append(self, drawn: Drawn) -> None:
        slots_R, ids_R = drawn.slots_R, drawn.token_ids_R
        self.stats.tokens_sampled += len(slots_R)
        kind_R = self._params_index[slots_R]
        ended_R = np.zeros(len(slots_R), dtype=bool)
        for kind in np.unique(kind_R):
            ended_R |= (kind_R == kind) & np.isin(ids_R, self._stops[kind])
        at_R = self._length[slots_R]
        self._token_ids[slots_R, at_R] = self._last_ids[slots_R] = ids_R
        self._new_logprobs[slots_R, at_R] = drawn.logprobs_R
        self._length[slots_R] += 1
        for row in np.nonzero(ended_R | (self._length[slots_R] >= self._limit[slots_R]))[0]:
            self._finish(int(slots_R[row]), bool(ended_R[row]))

    def _finish(self, slot: int, ended: bool) -> None:
        session = self._places[slot]
        begin, end = session.length, int(self._length[slot])
        stop = SampleStop.END if ended else SampleStop.CONTEXT if end == self.max_context else SampleStop.LENGTH
        session.computed = int(self._computed[slot])
        self._active[slot] = False
        session.append(self._token_ids[slot, begin:end], self._new_logprobs[slot, begin:end], stop)
