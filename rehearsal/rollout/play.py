"""Plays many episodes at once and returns groups of trajectories.

Every episode is a coroutine: it shows its agent what the environment said, waits for the engine's sample, and steps its
environment. The engine batches whoever is waiting for it; environments that are not ``fast`` run in threads of their
own with a time limit, so a slow or hanging one holds nobody else up.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from rehearsal.agents.agent import Agent, Limits
from rehearsal.agents.feedback import Feedback, with_feedback
from rehearsal.agents.play import check_reset, check_words, play_actions
from rehearsal.agents.protocol import Protocol as AnswerProtocol
from rehearsal.agents.toolbox import Toolkit
from rehearsal.environments.base import TextEnv
from rehearsal.environments.luck import reset_with_luck
from rehearsal.errors import GenerationError, RecipeError, RehearsalError
from rehearsal.generation.sampling import SamplingParams, stream_key
from rehearsal.generation.session import Engine, Session
from rehearsal.models.chat import ChatRenderer, Rendered
from rehearsal.rollout.places import CarriedError, HungError, Place, run_coroutine, together
from rehearsal.texts import clean_text
from rehearsal.trajectory import Group, StopReason, Trajectory, Turn, info_success
from rehearsal.usage import merged

T = TypeVar("T")

_CLOSING_SECONDS = 5.0


@dataclass(frozen=True)
class Task:
    """What a group of episodes is about.

    Attributes:
        seed: the environment is reset with it.
        split: "train", "validation" or "test".
        environment: which of the rollout's environments.
        options: what the environment is reset with beside split and chance, such as ``{"company": 51}`` at the help
            desk.
        locked: tools that its episodes do not have, see :meth:`rehearsal.agents.toolbox.Toolkit.open`.
        again: how often its step has played the same task before. Each time brings other noise and other luck.
    """

    seed: int
    split: str = "train"
    environment: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    locked: tuple[str, ...] = ()
    again: int = 0


def tasks_of_step(seed: int, step: int, count: int, split: str = "train", first: int = 0) -> list[Task]:
    """The tasks of a training step: a function of (seed, step), so a resumed run gets the same ones."""
    return [Task(stream_key(seed, "task", split, step, first + i) % 2**31, split) for i in range(count)]


class Player(Protocol):
    """Whatever plays episodes: a :class:`Rollout` in this process, or several in others."""

    def play(
        self, tasks: Sequence[Task], group_size: int, *, step: int = 0, sampling: SamplingParams | None = None,
        on_episode: Callable[[Trajectory], None] | None = None,
    ) -> list[Group]:  # fmt: skip
        """As :meth:`Rollout.play`."""

    def close(self) -> None:
        """Give back environments and processes."""


class Rollout:
    """Plays an agent in an environment.

    Args:
        make_env: makes one environment; called once for each episode that is played at the same time, in a thread of
            its own unless they are known to be fast. Several where tasks name different environments.
        engine: where answers are sampled.
        renderer, protocol, limits: what the agent sees and may do (no renderer where the server renders); limits for
            each environment, or one for all.
        sampling: the distribution of the answers; its ``max_tokens`` and stop tokens are set here.
        seed: part of the sampling noise.
        workers: how many environments that are not fast may be stepped at the same time.
        step_timeout: seconds that making an environment, a reset or the actions of one turn may take, for environments
            that are not fast, beyond what they say themselves (``step_seconds``).
        keep_ending: whether the environment's last words, which no answer follows, are among an episode's tokens; a
            world model learns from them.
        toolkit: the tools that agents have beside those of their environment; closed with the rollout.
        feedback: the user who comments on answers, if there is one.
    """

    def __init__(
        self, make_env: Callable[[], TextEnv] | Sequence[Callable[[], TextEnv]], engine: Engine,
        renderer: ChatRenderer | None, protocol: AnswerProtocol, limits: Limits | Sequence[Limits], *,
        sampling: SamplingParams | None = None, seed: int = 0, workers: int = 64, step_timeout: float = 60.0,
        keep_ending: bool = False, toolkit: Toolkit | None = None, feedback: Feedback | None = None,
    ) -> None:  # fmt: skip
        self.makers = [make_env] if callable(make_env) else list(make_env)
        self.engine = engine
        self.renderer = renderer
        self.protocol = protocol
        self.all_limits = [limits] * len(self.makers) if isinstance(limits, Limits) else list(limits)
        self.sampling = sampling or SamplingParams()
        self.seed = seed
        self.workers = workers
        self.step_timeout = step_timeout
        self.keep_ending = keep_ending
        self.toolkit = toolkit or Toolkit()
        self.feedback = feedback
        self._places: list[list[Place]] = [[] for _ in self.makers]
        # What is known of each kind of environment once one of it was made.
        self._fast: list[bool | None] = [None] * len(self.makers)
        self._names = [TextEnv.name] * len(self.makers)

    @property
    def limits(self) -> Limits:
        """Those of the first environment."""
        return self.all_limits[0]

    def play(
        self, tasks: Sequence[Task], group_size: int, *, step: int = 0, sampling: SamplingParams | None = None,
        on_episode: Callable[[Trajectory], None] | None = None,
    ) -> list[Group]:  # fmt: skip
        """Play ``group_size`` episodes of every task.

        Args:
            tasks: what to play.
            group_size: episodes of each task.
            step: the optimiser step of the policy; part of the sampling noise and noted in the trajectories.
            sampling: another distribution than usual, for evaluation.
            on_episode: called as each episode ends, for progress.

        Returns:
            one group for each task, in order. Episodes that failed are in their group, with a stop reason and without
            a reward.
        """
        return run_coroutine(self.play_async(tasks, group_size, step=step, sampling=sampling, on_episode=on_episode))

    async def play_async(
        self, tasks: Sequence[Task], group_size: int, *, step: int = 0, sampling: SamplingParams | None = None,
        on_episode: Callable[[Trajectory], None] | None = None,
    ) -> list[Group]:  # fmt: skip
        # Enough groups to keep every place of the engine busy while others wait for their environments, and no more:
        # ten thousand tasks must not mean ten thousand environments.
        in_flight = asyncio.Semaphore(max(1, 2 * self.engine.capacity // max(1, group_size)))
        stepping = asyncio.Semaphore(self.workers)
        for kind in sorted({task.environment for task in tasks}):
            await self._look_at(kind)

        async def one(task: Task) -> Group:
            async with in_flight:
                return await self._group(task, group_size, step, sampling or self.sampling, stepping, on_episode)

        return await together([one(task) for task in tasks])

    def check_opening(self) -> None:
        """See whether rules and first observation leave room for an answer, on one training task.

        An environment that fails here is not judged: the run counts its failed episodes.

        Raises:
            RecipeError: if they do not.
        """
        for number, limits in enumerate(self.all_limits):
            episode = run_coroutine(self._first_episode(number, replace(limits, max_context=1 << 30)))
            episode.place.close()
            _close_toolbox(episode.agent)
            needed = 0 if episode.prompt is None else len(episode.prompt)
            if needed >= limits.max_context:
                raise RecipeError(
                    f"The rules and the first observation of {episode.trajectory.environment} take {needed} tokens, "
                    f"which leaves no room for an answer in agent.max_context ({limits.max_context} tokens); raise it "
                    f"to {needed + limits.max_tokens_per_turn} or more."
                )

    async def _first_episode(self, kind: int, limits: Limits) -> Episode:
        await self._look_at(kind)
        return await self._open(Task(0, environment=kind), 0, 0, asyncio.Semaphore(1), limits)

    def facts(self) -> dict[str, str]:
        """What environments and tools work with, such as the level of isolation of a sandbox."""
        told = [self.toolkit.facts()]
        for make in self.makers:
            with contextlib.closing(make()) as env:
                told.append(env.facts())
        return merged(told)

    def close(self) -> None:
        """Close environments and tools; an environment that takes longer than a few seconds is left behind."""
        places = [place for kind in self._places for place in kind]
        self._places = [[] for _ in self.makers]
        for place in places:
            place.close()
        patience = time.monotonic() + _CLOSING_SECONDS
        for place in places:
            if place.thread is not None:
                place.thread.join(max(0.0, patience - time.monotonic()))
        self.toolkit.close()

    async def _group(
        self, task: Task, size: int, step: int, sampling: SamplingParams, stepping: asyncio.Semaphore,
        on_episode: Callable[[Trajectory], None] | None,
    ) -> Group:  # fmt: skip
        begun: list[Episode] = []
        sessions: list[Any] = []
        try:
            openings = await together(
                [self._open(task, sample, step, stepping, begun=begun) for sample in range(size)]
            )  # fmt: skip
            sessions = self._sessions(openings, task, step)
            trajectories = await together(
                [
                    self._episode(episode, session, sampling, stepping, on_episode)
                    for episode, session in zip(openings, sessions, strict=True)
                ]
            )
        except BaseException:
            # Play is broken off, by Ctrl-C or because the engine fails: what the episodes hold is given back.
            for session in sessions:
                if session is not None:
                    session.close()
            for episode in begun:
                self._abandon(episode)
            raise
        return Group(trajectories)

    def _sessions(self, openings: Sequence[Episode], task: Task, step: int) -> list[Any]:
        """A session for each episode that has begun. What the members of a group have in common is computed once: each
        is a fork of a session with the opening."""
        roots: dict[bytes, Session] = {}
        sessions: list[Session | None] = []
        for episode in openings:
            if episode.prompt is None:
                sessions.append(None)
                continue
            content = episode.prompt.token_ids.tobytes()
            if content not in roots:
                roots[content] = self.engine.session(stream_key(self.seed, "group", task.split, task.seed, step))
                roots[content].extend(episode.prompt.token_ids)
            sessions.append(roots[content].fork(self._key(task, episode.trajectory.sample, step)))
        for root in roots.values():
            root.close()
        return sessions

    def _key(self, task: Task, sample: int, step: int) -> int:
        again = (task.again,) if task.again else ()
        return stream_key(self.seed, "episode", task.split, task.seed, sample, step, *again)

    def _new_agent(self, limits: Limits) -> Agent:
        assert self.renderer is not None
        return Agent(self.renderer, self.protocol, limits, keep_ending=self.keep_ending)

    def _place_for(self, kind: int) -> Place:
        """An idle place for an environment, or a new one that it is still to be made in."""
        if idle := self._places[kind]:
            return idle.pop()
        return Place(self.makers[kind], threaded=not (self._fast[kind] and self._company_is_fast))

    @property
    def _company_is_fast(self) -> bool:
        """Tools are called where the environment is stepped, and users asked: one that takes long must not hold up the
        others."""
        return self.toolkit.fast and (self.feedback is None or self.feedback.fast)

    async def _look_at(self, kind: int) -> None:
        """Make the first environment of a kind, before anybody plays, to see whether the others need threads. If that
        fails, they get them: they may be slow, and what is wrong is told by the episodes that need them."""
        if self._fast[kind] is not None:
            return
        place = Place(self.makers[kind], threaded=True)
        try:
            self._meet(kind, await place.call(place.fill, self.step_timeout))
        except Exception:
            place.close()
            return
        except BaseException:
            place.close()
            raise
        if self._fast[kind] and self._company_is_fast:
            place.settle()
        self._places[kind].append(place)

    def _meet(self, kind: int, env: TextEnv) -> None:
        """Remember what an environment says about all of its kind."""
        self._fast[kind], self._names[kind] = bool(env.fast), env.name

    async def _answer(self, agent: Agent, session: Any, sampling: SamplingParams) -> Turn:
        """Sample the agent's next answer, and have it read."""
        sample = await session.sample(
            SamplingParams(
                sampling.temperature, sampling.top_k, sampling.top_p, agent.tokens_left, agent.renderer.stop_token_ids
            )
        )  # fmt: skip
        with reading():
            return agent.read(sample.token_ids, sample.logprobs, sample.stop)

    def _show(self, session: Any, prompt: Rendered) -> None:
        """Put what the agent is shown into its session."""
        session.extend(prompt.token_ids)

    async def _open(
        self, task: Task, sample: int, step: int, stepping: asyncio.Semaphore, limits: Limits | None = None,
        begun: list[Episode] | None = None,
    ) -> Episode:  # fmt: skip
        kind = task.environment
        place = self._place_for(kind)
        trajectory = Trajectory(self._names[kind], task.seed, task.split, sample=sample, policy_step=step)
        agent = self._new_agent(limits or self.all_limits[kind])
        episode = Episode(trajectory, agent, place, kind=kind)
        if begun is not None:
            begun.append(episode)
        if place.empty:
            try:
                self._meet(kind, await self._call(place, place.fill, stepping))
            except Exception as error:
                hung = isinstance(error, HungError)
                self._failed(episode, error, "Making the environment" if hung else "The environment could not be made")
                return episode
        env = place.env
        trajectory.environment = env.name

        def reset() -> tuple[dict[str, Any], Rendered | None]:
            # The members of a group share their task and not their luck: with the same slips and payouts for all, a
            # group would learn that the lucky action of this one seed is the better one.
            chance = stream_key("chance", task.again, sample) % 2**31 if task.again else sample
            returned = reset_with_luck(env, task.seed, {**task.options, "split": task.split, "chance": chance})
            observation, info = check_reset(env, returned)
            # Rules and legal actions are the environment's own code too, which may be slow or hang.
            toolbox = self.toolkit.open(env, task.locked)
            prompt = None
            try:
                prompt = agent.opening(check_words(env), observation, info.get("state") or "", env, toolbox)
            finally:
                # The agent may not have it yet where the rules raise; and nobody waits for it if it came too late.
                if toolbox is not None and (prompt is None or trajectory.failed):
                    toolbox.close()
            return info, prompt

        try:
            info, episode.prompt = await self._call(place, reset, stepping)
            trajectory.task = info.get("task") or ""
            trajectory.topic = info.get("topic") or ""
            trajectory.category = info.get("category") or ""
            # Holds until an action is executed; an agent that never acts has not succeeded.
            trajectory.success = info_success(info)
        except Exception as error:
            self._failed(episode, error, f"{type(env).__name__}.reset")
        return episode

    async def _episode(
        self, episode: Episode, session: Any, sampling: SamplingParams, stepping: asyncio.Semaphore,
        on_episode: Callable[[Trajectory], None] | None,
    ) -> Trajectory:  # fmt: skip
        agent, place, trajectory = episode.agent, episode.place, episode.trajectory
        try:
            while episode.prompt is not None:
                try:
                    turn = await self._answer(agent, session, sampling)
                except UnreadableError as error:
                    self._failed(episode, error, "The agent's answer could not be read")
                    break

                def act(turn: Any = turn) -> Any:
                    played = play_actions(
                        place.env, turn, agent.protocol, agent.actions_left, agent.toolbox, agent.foretold
                    )
                    return with_feedback(self.feedback, place.env, agent, played)

                # Calls have time limits of their own, and the agent is told which of them took too long.
                extra = agent.toolbox.seconds_for(turn.calls) if agent.toolbox is not None else 0.0
                extra += self.feedback.seconds if self.feedback is not None else 0.0
                extra += place.env.step_seconds
                try:
                    result = await self._call(place, act, stepping, self.step_timeout + extra)
                except Exception as error:
                    self._failed(episode, error, f"{type(place.env).__name__}.step")
                    break
                # One episode that cannot be told on must not cost all the others of the step; an engine that fails
                # does, because none of them can go on then.
                unshown = f"What {type(place.env).__name__}.step returned cannot be shown"
                try:
                    episode.prompt = agent.next_turn(result)
                except Exception as error:
                    self._failed(episode, error, unshown)
                    break
                if episode.prompt is not None:
                    try:
                        self._show(session, episode.prompt)
                    except (GenerationError, RuntimeError, MemoryError):
                        raise
                    except Exception as error:
                        self._failed(episode, error, unshown)
                        break
        finally:
            if session is not None:
                session.close()
            _close_toolbox(agent)
        if not trajectory.failed and agent.stop_reason is not None:
            trajectory.stop_reason = agent.stop_reason
        if len(agent.transcript):
            trajectory.segments = [agent.transcript.segment()]
        trajectory.turns = agent.turns
        if agent.success is not None:
            trajectory.success = agent.success
        trajectory.final_observation = agent.final_observation
        trajectory.counters |= {name: float(count) for name, count in agent.counters.items()}
        episode.over = True
        if trajectory.failed or (agent.toolbox is not None and agent.toolbox.disturbed):
            # Nobody knows what state it is in: the next episode gets a new one.
            place.close()
        else:
            self._places[episode.kind].append(place)
        if on_episode is not None:
            on_episode(trajectory)
        return trajectory

    def _abandon(self, episode: Episode) -> None:
        """Give back what an episode holds that is not played to its end."""
        if not episode.over:
            episode.over = True
            # For a reset that is still on its way.
            episode.trajectory.stop_reason = StopReason.ERROR
            episode.trajectory.error = "The episode was broken off."
            _close_toolbox(episode.agent)
            episode.place.close()

    async def _call(
        self, place: Place, function: Callable[[], T], stepping: asyncio.Semaphore, timeout: float | None = None
    ) -> T:
        seconds = self.step_timeout if timeout is None else timeout
        if place.thread is None:
            return await place.call(function, seconds)
        async with stepping:
            return await place.call(function, seconds)

    def _failed(self, episode: Episode, error: BaseException, where: str) -> None:
        if isinstance(error, CarriedError):
            error = error.raised
        if isinstance(error, HungError):
            episode.trajectory.stop_reason = StopReason.TIMEOUT
            episode.trajectory.error = f"{where} took longer than {error.seconds:g} s."
            return
        episode.trajectory.stop_reason = StopReason.ERROR
        if isinstance(error, RehearsalError):
            episode.trajectory.error = clean_text(str(error))
        else:
            said = clean_text(" ".join(str(error).split())[:200])
            # A method raises; what is told in a sentence has it for its reason.
            joined = f"{where}:" if " " in where else f"{where} raised"
            episode.trajectory.error = f"{joined} {type(error).__name__}{': ' + said if said else ''}."


class UnreadableError(CarriedError):
    """Carries what was raised about one answer, by an agent that could not read it or a server that would not give it:
    that is its own episode's trouble."""


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Mark what an agent raises inside the block, to tell it from what the engine raises."""
    try:
        yield
    except Exception as error:
        raise UnreadableError(error) from error


def _close_toolbox(agent: Agent) -> None:
    if agent.toolbox is not None:
        agent.toolbox.close()


@dataclass
class Episode:
    """An episode that has begun.

    Attributes:
        trajectory: what it leaves.
        agent: who plays it.
        place: where its environment lives.
        prompt: the tokens before the next answer; None once it is over, or if it never began.
        kind: which of the rollout's environments it is played in.
        over: whether its environment was given back.
    """

    trajectory: Trajectory
    agent: Agent
    place: Place
    prompt: Rendered | None = None
    kind: int = 0
    over: bool = False
