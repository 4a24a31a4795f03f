"""Held-out play of a model behind a server that speaks the OpenAI chat API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from rehearsal.agents.agent import Agent, Limits
from rehearsal.agents.protocol import THINK_CLOSE, THINK_OPEN, Protocol
from rehearsal.agents.text import TextAgent
from rehearsal.environments.base import TextEnv
from rehearsal.errors import GenerationError
from rehearsal.generation.remote import (
    ChatSession,
    ContextOverflowError,
    RemoteEngine,
    ServerRefusalError,
    UnreachableError,
)
from rehearsal.generation.sampling import SamplingParams
from rehearsal.models.chat import Rendered
from rehearsal.rollout import Episode, Rollout, Task
from rehearsal.rollout.play import UnreadableError, reading
from rehearsal.trajectory import SampleStop, Turn


class ChatRollout(Rollout):
    """Plays episodes with messages instead of tokens.

    Args:
        make_env: makes one environment.
        engine: the server; its ``capacity`` bounds the requests at once.
        protocol, limits: what the agent may do.
        sampling: the distribution of the answers.
        others: as for :class:`rehearsal.rollout.Rollout`.
    """

    def __init__(
        self, make_env: Callable[[], TextEnv] | Sequence[Callable[[], TextEnv]], engine: RemoteEngine,
        protocol: Protocol, limits: Limits | Sequence[Limits],
        **others: Any,
    ) -> None:  # fmt: skip
        super().__init__(make_env, engine, None, protocol, limits, **others)

    def _sessions(self, openings: Sequence[Episode], task: Task, step: int) -> list[Any]:
        engine = cast(RemoteEngine, self.engine)
        sessions: list[Any] = []
        for episode in openings:
            begun = episode.prompt is not None
            sessions.append(engine.chat(self._key(task, episode.trajectory.sample, step)) if begun else None)
        return sessions

    def _new_agent(self, limits: Limits) -> Agent:
        return TextAgent(self.protocol, limits)

    async def _answer(self, agent: Agent, session: Any, sampling: SamplingParams) -> Turn:
        assert isinstance(agent, TextAgent)
        self._add_messages(agent, session)
        params = SamplingParams(sampling.temperature, sampling.top_k, sampling.top_p, agent.tokens_left)
        try:
            answer = await session.answer(params)
        except ContextOverflowError:
            # The server's context is full: the episode ends here, as it would with a context of our own.
            with reading():
                return agent.read_text("", SampleStop.CONTEXT)
        except GenerationError as error:
            if isinstance(error, UnreachableError) or (isinstance(error, ServerRefusalError) and error.lasting):
                raise
            # A filter of the server, or a request that it does not take or cannot answer: the others may still do.
            raise UnreadableError(error) from error
        text = answer.text
        if answer.reasoning and self.protocol.thinking and THINK_OPEN not in text:
            # The rules ask for thoughts in the answer. A server that takes them out is shown them again, as the model
            # wrote them: without them it would play another game than the same model does here.
            text = f"{THINK_OPEN}{answer.reasoning}{THINK_CLOSE}{text}"
            session.restate(text)
        agent.counters["server_tokens"] += answer.tokens
        with reading():
            return agent.read_text(text, answer.stop)

    def _show(self, session: Any, prompt: Rendered) -> None:
        """Nothing: the messages are taken from the agent when it answers."""

    @staticmethod
    def _add_messages(agent: Agent, session: ChatSession) -> None:
        assert isinstance(agent, TextAgent)
        for role, text in agent.take_messages():
            session.add(role, text)
