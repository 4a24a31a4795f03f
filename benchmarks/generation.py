"""The local engine against a loop over ``model.generate`` that reads the whole history again in each turn.

Episodes have a prompt and then turns of a synthetic observation and an answer, all of fixed length: no answer ends
early, so both sides do exactly the same work and the continuous batching of the engine brings it nothing. What is
measured is what keeping keys and values across turns is worth. All histories of the loop have the same length, so its
batches need no padding, which favours the loop.

Training plays a small model on a processor in as many processes as there are threads, since Python itself takes much of
the time; so does the engine here, each process with its share of the episodes. ``ratio`` compares that with the loop,
which has the same cores for the threads of its products; ``one_process_ratio`` compares the engine in the process of
the loop with it; and ``loops_ratio``, at 10 turns, the processes with as many loops, each with its share too.

Also measured is whether the cost of the engine is linear in the number of turns: the time of a turn in long episodes
over that in short ones (attention grows with the context, so it cannot be 1).
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common import interleaved, parser, ratio, report, say
from benchmarks.setting import model_folder
from rehearsal.generation.local import LocalEngine
from rehearsal.generation.sampling import SamplingParams, stream_key
from rehearsal.models.load import load_policy
from rehearsal.rollout import run_coroutine

LOOPS_AT = 10
"""Turns at which loops in processes are timed too."""


@dataclass(frozen=True)
class Script:
    """The shape of the episodes, in tokens.

    Attributes:
        episodes: played at the same time.
        turns: answers of each.
        prompt: before the first answer.
        observation: before every other answer.
        answer: sampled in each turn.
    """

    episodes: int
    turns: int
    prompt: int
    observation: int
    answer: int

    @property
    def context(self) -> int:
        return self.prompt + self.turns * self.answer + (self.turns - 1) * self.observation

    def texts(self, vocabulary: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Random token ids: prompts of shape (episodes, prompt), observations (episodes, turns, observation)."""
        rng = np.random.default_rng(seed)
        prompts = rng.integers(vocabulary, size=(self.episodes, self.prompt), dtype=np.int64)
        observations = rng.integers(vocabulary, size=(self.episodes, self.turns, self.observation), dtype=np.int64)
        return prompts, observations


def play_engine(engine: LocalEngine, script: Script, seed: int) -> int:
    """Play all episodes with the engine; returns the number of sampled tokens."""
    vocabulary = engine.model.config.get_text_config().vocab_size
    prompts, observations = script.texts(vocabulary, seed)
    params = SamplingParams(max_tokens=script.answer)

    async def episode(index: int) -> int:
        session = engine.session(stream_key(seed, index))
        session.extend(prompts[index])
        sampled = 0
        for turn in range(script.turns):
            sampled += len((await session.sample(params)).token_ids)
            if turn + 1 < script.turns:
                session.extend(observations[index, turn])
        session.close()
        return sampled

    async def all_episodes() -> int:
        return sum(await asyncio.gather(*(episode(index) for index in range(script.episodes))))

    return run_coroutine(all_episodes())


@torch.no_grad()
def play_generate(model: Any, script: Script, seed: int) -> int:
    """Play all episodes in lockstep with ``model.generate``; returns the number of sampled tokens."""
    device = next(model.parameters()).device
    prompts, observations = (
        torch.from_numpy(ids).to(device) for ids in script.texts(model.config.get_text_config().vocab_size, seed)
    )
    config = GenerationConfig(
        max_new_tokens=script.answer, min_new_tokens=script.answer, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        use_cache=True, eos_token_id=None, pad_token_id=0, disable_compile=True,
    )  # fmt: skip
    stored, model.generation_config = model.generation_config, config
    history = prompts
    torch.manual_seed(seed)
    model.eval()
    sampled = 0
    try:
        for turn in range(script.turns):
            before = history.shape[1]
            history = model.generate(
                input_ids=history, attention_mask=torch.ones_like(history), generation_config=config
            )
            sampled += (history.shape[1] - before) * history.shape[0]
            if turn + 1 < script.turns:
                history = torch.cat([history, observations[:, turn]], dim=1)
    finally:
        model.generation_config = stored
    return sampled


class Players:
    """Processes that play shares of the episodes, each with a model and one thread of its own."""

    def __init__(self, folder: Path, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        for _ in range(count):
            own, its = context.Pipe()
            context.Process(target=_serve, args=(its, str(folder)), daemon=True).start()
            self._pipes.append(own)

    def play(self, how: str, script: Script, seed: int, context: int | None = None) -> int:
        """Play all episodes with the ``engine``, which has room for ``context`` tokens or as many as the script takes,
        or by ``generate``; returns the number of sampled tokens."""
        count = len(self._pipes)
        for number, pipe in enumerate(self._pipes):
            share = len(range(number, script.episodes, count))
            pipe.send((how, replace(script, episodes=share), seed + number, context or script.context))
        return sum(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


@contextlib.contextmanager
def players(folder: Path, count: int) -> Iterator[Players | None]:
    """Processes for as long as the block runs; None where one is enough."""
    if count == 1:
        yield None
        return
    found = Players(folder, count)
    try:
        yield found
    finally:
        found.close()


def _serve(pipe: Any, folder: str) -> None:
    torch.set_num_threads(1)
    model = load_policy(folder, device="cpu").model
    engines: dict[tuple[int, int], LocalEngine] = {}
    while (job := pipe.recv()) is not None:
        how, script, seed, context = job
        if how == "generate":
            pipe.send(play_generate(model, script, seed))
            continue
        shape = (context, script.episodes)
        if shape not in engines:
            engines = {shape: LocalEngine(model, max_context=context, max_sessions=script.episodes)}
        pipe.send(play_engine(engines[shape], script, seed))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="base", help='a model folder, "base", or "random"')
    options.add_argument("--turns", type=int, nargs="+", default=[2, 5, 10, 20])
    options.add_argument("--episodes", type=int, default=64)
    options.add_argument("--prompt", type=int, default=160, help="tokens before the first answer")
    options.add_argument("--observation", type=int, default=48, help="tokens before every other answer")
    options.add_argument("--answer", type=int, default=24, help="sampled tokens of a turn")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--processes", type=int, help="of the engine; as many as threads of PyTorch if left out")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.quick:
        given.turns, given.episodes, given.repeats = [t for t in given.turns if t <= 5], min(given.episodes, 16), 1
        given.answer = min(given.answer, 12)
    processes = given.processes or torch.get_num_threads()
    figures: dict[str, float] = {"episodes": float(given.episodes), "processes": float(processes)}
    per_turn: dict[int, float] = {}
    with model_folder(given.model) as folder, players(folder, processes) as others:
        policy = load_policy(folder, device="cpu")
        for turns in sorted(given.turns):
            script = Script(given.episodes, turns, given.prompt, given.observation, given.answer)
            engine = LocalEngine(policy.model, max_context=script.context, max_sessions=script.episodes)
            if engine.capacity < script.episodes:
                raise SystemExit(f"The memory holds {engine.capacity} of {script.episodes} episodes; lower --episodes.")
            works = {
                "one_process": partial(play_engine, engine, script, given.seed),
                "generate": partial(play_generate, policy.model, script, given.seed),
            }
            if others is not None:
                works["engine"] = partial(others.play, "engine", script, given.seed)
                if turns == LOOPS_AT:
                    works["loops"] = partial(others.play, "generate", script, given.seed)
            expected = script.episodes * script.turns * script.answer
            # A short warm-up of the same shape would cost as much as a repeat; a first turn is enough.
            brief = Script(script.episodes, 1, script.prompt, script.observation, 4)
            play_engine(engine, brief, given.seed)
            play_generate(policy.model, brief, given.seed)
            if others is not None:
                others.play("engine", brief, given.seed, script.context)
                others.play("generate", brief, given.seed)
            seconds = interleaved(works, given.repeats, warmup=0)
            seconds.setdefault("engine", seconds["one_process"])
            for name, work_seconds in seconds.items():
                figures[f"{name}_tokens_per_second_{turns}_turns"] = expected / statistics.median(work_seconds)
            figures |= ratio(seconds["generate"], seconds["engine"]).figures(f"ratio_{turns}_turns")
            figures |= ratio(seconds["generate"], seconds["one_process"]).figures(f"one_process_ratio_{turns}_turns")
            if "loops" in seconds:
                figures |= ratio(seconds["loops"], seconds["engine"]).figures(f"loops_ratio_{turns}_turns")
            per_turn[turns] = statistics.median(seconds["engine"]) / turns
            figures[f"seconds_per_turn_{turns}_turns"] = per_turn[turns]
            say(f"{turns} turns: {figures[f'ratio_{turns}_turns']:.2f} times faster")
    goals: dict[str, str] = {}
    if "ratio_10_turns" in figures:
        goals["ratio_10_turns"] = ">= 5"
    if {5, 20} <= set(per_turn):
        figures["turn_20_over_turn_5"] = per_turn[20] / per_turn[5]
        goals["turn_20_over_turn_5"] = "<= 1.5"
    report("generation", figures, goals, [given.seed], given.quick)


if __name__ == "__main__":
    main()
