"""Transcripts of scripted players, made by number: episode i of a stream is the same whoever makes it, and when."""

from __future__ import annotations

import multiprocessing
import queue
import string
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rehearsal.agents.agent import Limits
from rehearsal.agents.players import SkillMix, scripted_episode
from rehearsal.agents.protocol import Protocol
from rehearsal.agents.toolbox import Toolkit, ToolLimits
from rehearsal.agents.toolkit import make_source
from rehearsal.environments import make
from rehearsal.environments.base import SPLITS, TextEnv
from rehearsal.errors import CheckpointError, RehearsalError
from rehearsal.models.chat import ChatRenderer
from rehearsal.training.base_config import BaseConfig, Scene
from rehearsal.training.base_tokenizer import MIN_VOCABULARY, train_tokenizer
from rehearsal.training.playing import DEFAULT_TOOL_TURNS
from rehearsal.trajectory import Segment, StopReason, Trajectory

CHUNK_EPISODES = 128
"""Episodes that the background process hands over at once."""
_WAITING_CHUNKS = 16
_SECONDS_TO_ANSWER = 300.0


class Transcript(NamedTuple):
    """The tokens of one episode, and what says which episodes begin with the same system prompt.

    token_ids is int32, kinds int8 and turns int16, all of shape (T,).
    """

    token_ids: np.ndarray
    kinds: np.ndarray
    turns: np.ndarray
    opening: int


class TranscriptSource:
    """Plays the episodes that a base model is made of.

    Args:
        config: scenes, players, shares and seed.
        tokenizer: with a chat template.
        split: the split that the tasks come from; "train" for everything that is trained on.
    """

    def __init__(self, config: BaseConfig, tokenizer: Any, split: str = "train") -> None:
        self.config = config
        self.split = split
        self.renderer = ChatRenderer(tokenizer)
        self._environments: list[TextEnv] = [make(scene.environment, **scene.params) for scene in config.scenes]
        weights = np.array([scene.weight for scene in config.scenes])
        self._shares = weights / weights.sum()
        self._mixes = [_mix_of(config.mix, scene) for scene in config.scenes]
        self._sources = [[make_source(name) for name in scene.tools] for scene in config.scenes]
        self._callable = [
            bool(sources) or type(env).tools is not TextEnv.tools
            for sources, env in zip(self._sources, self._environments, strict=True)
        ]

    def episode(self, index: int) -> tuple[Trajectory, Transcript]:
        """Episode number ``index`` of the stream that seed and split name."""
        config = self.config
        rng = np.random.default_rng([config.seed, SPLITS.index(self.split), index])
        scene = int(rng.choice(len(self._shares), p=self._shares))
        env = self._environments[scene]
        max_calls = None
        if self._callable[scene] and rng.random() < config.free_limits:
            max_calls = int(rng.integers(2, 7))
        limits = self._limits(env, rng, (max_calls or DEFAULT_TOOL_TURNS) if config.scenes[scene].tools else 0)
        thinking = bool(rng.random() >= config.thoughtless)
        rehearse = thinking and bool(rng.random() < config.scenes[scene].rehearse)
        player = self._mixes[scene].draw(rng)
        trajectory = scripted_episode(
            env, player, self.renderer, rng, seed=int(rng.integers(2**31)), split=self.split,
            protocol=Protocol(thinking=thinking, rehearse=rehearse), limits=limits,
            toolkit=Toolkit(self._sources[scene], ToolLimits(max_calls)),
        )  # fmt: skip
        segment = trajectory.segments[0]
        # A digest and no counter: it must not depend on the episode that this source began with.
        opening = zlib.crc32(repr((scene, limits, thinking, rehearse, max_calls)).encode())
        return trajectory, Transcript(segment.token_ids, segment.kinds, segment.turns, opening)

    def transcripts(self, start: int = 0) -> Iterator[Transcript]:
        """All transcripts from a number on, without end."""
        index = start
        while True:
            yield self.episode(index)[1]
            index += 1

    def _limits(self, env: TextEnv, rng: np.random.Generator, tool_turns: int) -> Limits:
        context = self.config.max_positions
        if tool_turns or env.max_turns == 1 or rng.random() >= self.config.free_limits:
            return Limits.for_env(env, max_context=context, tool_turns=tool_turns)
        return Limits.for_env(
            env, max_turns=int(rng.integers(3, 9)), max_actions_per_turn=int(rng.integers(1, 4)), max_context=context
        )


def _mix_of(mix: SkillMix, scene: Scene) -> SkillMix:
    return replace(mix, **scene.skill)


def make_tokenizer(config: BaseConfig) -> Any:
    """The tokenizer of a base model, trained on the texts of its first episodes."""
    # The first episodes are played in single bytes: what is said does not depend on how it is cut into tokens.
    letters = train_tokenizer([], MIN_VOCABULARY)
    source = TranscriptSource(config, letters)
    texts = [
        source.renderer.decode(transcript.token_ids)
        for transcript, _ in zip(source.transcripts(), range(config.tokenizer_episodes), strict=False)
    ]
    # Any sign may be a cell of somebody's grid, so each gets a token together with the blank before it.
    signs = " ".join(["", *string.ascii_letters, *string.digits, *string.punctuation])
    return train_tokenizer([*texts, *[signs] * 1000], config.vocabulary)


def stream_transcripts(config: BaseConfig, tokenizer: Any, background: bool, start: int = 0) -> Generator[Transcript]:
    """The transcripts of the training split, without end.

    Args:
        config: see :class:`TranscriptSource`.
        tokenizer: with a chat template.
        background: play in a second process, some way ahead of what was taken. It is ended when the iterator is closed.
        start: the number of the first one.

    Raises:
        RehearsalError: if the second process failed.
    """
    if not background:
        yield from TranscriptSource(config, tokenizer).transcripts(start)
        return
    context = multiprocessing.get_context("spawn")
    chunks: Any = context.Queue(_WAITING_CHUNKS)
    worker = context.Process(target=_play_on, args=(config, tokenizer, start, chunks), daemon=True)
    worker.start()
    try:
        while True:
            chunk = _next_chunk(worker, chunks)
            if isinstance(chunk, str):
                raise RehearsalError(f"The process that plays the episodes failed: {chunk}")
            yield from chunk
    finally:
        worker.terminate()
        worker.join()
        chunks.close()


def _next_chunk(worker: Any, chunks: Any) -> list[Transcript] | str:
    waited = 0.0
    while True:
        try:
            return chunks.get(timeout=1.0)
        except queue.Empty:
            waited += 1.0
        if not worker.is_alive():
            return f"it ended with code {worker.exitcode}."
        if waited > _SECONDS_TO_ANSWER:
            return f"it gave nothing for {_SECONDS_TO_ANSWER:g} seconds."


def _play_on(config: BaseConfig, tokenizer: Any, start: int, chunks: Any) -> None:
    """What the second process does: play, and hand over."""
    try:
        transcripts = TranscriptSource(config, tokenizer).transcripts(start)
        while True:
            chunks.put([next(transcripts) for _ in range(CHUNK_EPISODES)])
    except Exception as error:  # it is told to the process that waits
        chunks.put(f"{type(error).__name__}: {error}")


# --- transcripts on disk ----------------------------------------------------------------------------------------------


def save_transcripts(path: str | Path, trajectories: Sequence[Trajectory]) -> None:
    """Write the tokens of episodes, and what they were, into one compressed ``.npz`` file.

    Turns' texts are left out: training reads tokens.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    segments = [segment for trajectory in trajectories for segment in trajectory.segments]
    arrays: dict[str, np.ndarray] = {
        "n_segments": np.array([len(trajectory.segments) for trajectory in trajectories], dtype=np.int32),
        "lengths": np.array([len(segment) for segment in segments], dtype=np.int64),
        "token_ids": np.concatenate([np.empty(0, np.int32), *(segment.token_ids for segment in segments)]),
        "logprobs": np.concatenate([np.empty(0, np.float32), *(segment.logprobs for segment in segments)]),
        "kinds": np.concatenate([np.empty(0, np.int8), *(segment.kinds for segment in segments)]),
        "turns": np.concatenate([np.empty(0, np.int16), *(segment.turns for segment in segments)]),
        "seeds": np.array([trajectory.seed for trajectory in trajectories], dtype=np.int64),
        # Success may be unknown: -1.
        "success": np.array([-1 if t.success is None else int(t.success) for t in trajectories], dtype=np.int8),
    }
    for name in ("environment", "split", "task", "stop_reason"):
        arrays[name] = np.array([str(getattr(trajectory, name)) for trajectory in trajectories], dtype=np.str_)
    try:
        np.savez_compressed(path, allow_pickle=False, **arrays)
    except OSError as error:
        raise CheckpointError(f"The transcripts cannot be written to {path}: {error.strerror or error}.") from error


def load_transcripts(path: str | Path) -> list[Trajectory]:
    """Read what :func:`save_transcripts` wrote; the trajectories have no turns.

    Raises:
        CheckpointError: if the file cannot be read or is not one of transcripts.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {name: file[name] for name in file.files}
        ends = np.cumsum(data["lengths"])
        segments = [
            Segment(*(data[name][end - length : end] for name in ("token_ids", "logprobs", "kinds", "turns")))
            for end, length in zip(ends, data["lengths"], strict=True)
        ]
        trajectories = []
        used = 0
        for i, n_segments in enumerate(data["n_segments"].tolist()):
            known = int(data["success"][i])
            trajectories.append(
                Trajectory(
                    environment=str(data["environment"][i]),
                    seed=int(data["seeds"][i]),
                    split=str(data["split"][i]),
                    task=str(data["task"][i]),
                    segments=segments[used : used + n_segments],
                    stop_reason=StopReason(str(data["stop_reason"][i])),
                    success=None if known < 0 else bool(known),
                )
            )
            used += n_segments
    except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
        raise CheckpointError(f"The file {path} cannot be read as transcripts: {error}.") from error
    return trajectories
