"""What an agent sees and does each turn, with no engine in it.

An :class:`Agent` holds one episode. Whoever plays it asks for the next tokens, samples, hands the sample back, and
steps the environment; the agent keeps the books:

    agent = Agent(renderer, protocol, limits)
    prompt = agent.opening(env.instructions, observation)
    while prompt is not None:
        session.extend(prompt.token_ids)
        sample = session.sample(max_tokens=agent.tokens_left)
        turn = agent.read(sample.ids, sample.logprobs, sample.stop)
        result = play_actions(env, turn, agent.protocol, agent.actions_left, agent.toolbox, agent.foretold)
        prompt = agent.next_turn(result)
    agent.stop_reason, agent.turns, agent.counters, agent.transcript.segment()
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rehearsal.agents.play import PlayResult, check_reset, play_actions
from rehearsal.agents.protocol import THINK_CLOSE, Protocol
from rehearsal.agents.rehearse import PREDICT_OPEN
from rehearsal.agents.toolbox import Toolbox, ToolResult
from rehearsal.agents.transcript import TranscriptBuilder
from rehearsal.environments.base import TextEnv
from rehearsal.errors import RecipeError
from rehearsal.models.chat import ChatRenderer, Piece, Rendered, Role
from rehearsal.texts import clean_text
from rehearsal.trajectory import Kind, SampleStop, StopReason, ToolCall, Turn

__all__ = ["Agent", "Limits", "PlayResult", "TranscriptBuilder", "check_reset", "play_actions"]


@dataclass(frozen=True)
class Limits:
    """What one episode may use.

    Attributes:
        max_turns: answers in an episode.
        max_actions_per_turn: actions in an answer that count.
        max_actions: actions in an episode.
        max_tokens_per_turn: sampled tokens in an answer.
        max_context: tokens in an episode, prompts and answers together.

    Raises:
        RecipeError: if one of them is less than 1.
    """

    max_turns: int = 5
    max_actions_per_turn: int = 1
    max_actions: int = 10
    max_tokens_per_turn: int = 256
    max_context: int = 4096

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise RecipeError(f"{name} must be at least 1, not {value}.")

    @classmethod
    def for_env(
        cls,
        env: TextEnv,
        *,
        max_turns: int | None = None,
        max_actions_per_turn: int | None = None,
        max_actions: int | None = None,
        max_tokens_per_turn: int = 256,
        max_context: int = 4096,
        tool_turns: int = 0,
    ) -> Limits:
        """The environment's own limits where none is given; as many actions as all turns together may hold.

        Args:
            env: for its limits.
            max_turns, max_actions_per_turn, max_actions, max_tokens_per_turn, max_context: what is given.
            tool_turns: turns for tool calls beside those that the environment allows, where no turns are given.
        """
        turns = env.max_turns if max_turns is None else max_turns
        per_turn = env.max_actions_per_turn if max_actions_per_turn is None else max_actions_per_turn
        actions = turns * per_turn if max_actions is None else max_actions
        turns += tool_turns if max_turns is None else 0
        return cls(turns, per_turn, actions, max_tokens_per_turn, max_context)


class Agent:
    """The turns of one episode.

    Args:
        renderer: renders messages; shared by all episodes.
        protocol: the answer format. Its ``max_actions_per_turn`` is taken from ``limits``, its end tokens and the id of
            ``</think>`` from the renderer, and whether any text is an action from the environment.
        limits: what the episode may use.
        keep_ending: whether the environment's words after the last action, which nobody answers, become tokens of the
            transcript too.

    Attributes:
        protocol: the format as it is used here.
        toolbox: the tools that it may call; None if there are none.
        transcript: the tokens so far.
        turns: the turns so far; the last one is filled in as the episode goes on.
        actions_left: actions that the episode has left.
        stop_reason: why the episode is over; None while it is not.
        final_observation: the environment's words after the last action.
        success: what the environment said last about whether the task is solved.
        counters: by name: ``format_errors`` (answers that could not be read), ``illegal_actions``, ``surplus_actions``
            (left out because an answer or the episode had no room for them), ``skipped_actions`` (left out behind an
            illegal one), ``ineffective_actions``, ``cut_answers`` (ended by a limit, not by the policy),
            ``defused_tokens`` (special tokens spelled out in messages). An agent with tools also counts
            ``tool_calls/NAME`` and ``tool_failures/NAME`` for each of them, called or not, ``unknown_tools`` (calls of
            tools that there are not), ``refused_calls`` (beyond the calls that the episode has), ``surplus_calls``
            (beyond those of an answer) and ``oversized_results`` (results that the context had no room for).
    """

    def __init__(
        self, renderer: ChatRenderer, protocol: Protocol, limits: Limits, keep_ending: bool = False
    ) -> None:  # fmt: skip
        self.renderer = renderer
        self.keep_ending = keep_ending
        self.limits = limits
        self.protocol = protocol_for(renderer, protocol, limits)
        self.toolbox: Toolbox | None = None
        self.transcript = TranscriptBuilder()
        self.turns: list[Turn] = []
        self.actions_left = limits.max_actions
        self.stop_reason: StopReason | None = None
        self.final_observation = ""
        self.success: bool | None = None
        self.counters: Counter[str] = Counter()
        self._sampled_ids: Sequence[int] | np.ndarray = ()
        self._problem = ""
        self._words = ""

    @property
    def tokens_left(self) -> int:
        """How many tokens the next answer may take; at least 1 whenever a prompt was given."""
        return max(0, min(self.limits.max_tokens_per_turn, self.limits.max_context - len(self.transcript)))

    @property
    def foretold(self) -> list[str]:
        """The actions that predictions were about so far, each once."""
        return list(dict.fromkeys(a for turn in self.turns for one in turn.predictions for a in one.actions))

    def opening(
        self, env_instructions: str, observation: str, state: str = "", env: TextEnv | None = None,
        toolbox: Toolbox | None = None,
    ) -> Rendered | None:  # fmt: skip
        """The tokens before the first answer: rules, answer format, tools, first observation.

        Args:
            env_instructions: the environment's rules, ``env.instructions``.
            observation: its first observation.
            state: ``info["state"]`` of the reset, if there is one.
            env: for the answer format: its wording, and how an answer is read where any text is an action.
            toolbox: the tools that the agent may call.

        Returns:
            None if they leave no room for an answer; ``stop_reason`` is ``CONTEXT_LIMIT`` then, and there is no turn.
        """
        if toolbox is not None:
            self._equip(toolbox)
        if env is not None:
            self.protocol = replace(self.protocol, free_text=env.legal_actions() is None)
        self._words = observation
        turn = Turn(observation, notice=self._status(), state=state)
        return self._show(turn, self.renderer.first(self.system(env_instructions, env), self._pieces(turn)))

    def system(self, env_instructions: str, env: TextEnv | None = None) -> list[Piece]:
        """The content of the system message: rules, tools where the template does not show them, answer format."""
        rules = [env_instructions.strip(), self._tool_lines(), self.protocol.format_instructions(env)]
        return [Piece("\n".join(text for text in rules if text), Kind.SYSTEM)]

    def read(
        self, sampled_ids: Sequence[int] | np.ndarray, logprobs: Sequence[float] | np.ndarray, stop: SampleStop
    ) -> Turn:
        """Take an answer as it was sampled, and read it.

        Args:
            sampled_ids: its ids, the token that ends the turn included.
            logprobs: natural-log probability of each id under the distribution it was sampled from.
            stop: why sampling ended.

        Returns:
            The current turn, with what the agent wants to do. :func:`play_actions` takes it from there.
        """
        opened = self.renderer.opens_thought
        turn = self.turns[-1]
        kinds = self.protocol.kinds_of(sampled_ids, self.renderer.decode, opened)
        begin = len(self.transcript)
        self.transcript.add_sampled(sampled_ids, logprobs, kinds, len(self.turns) - 1)
        self._sampled_ids = sampled_ids
        if stop == SampleStop.LENGTH and len(self.transcript) >= self.limits.max_context:
            # The engine was given what was left of the context and cannot know that it was less than a turn's worth.
            stop = SampleStop.CONTEXT
        turn.stop = stop
        turn.response = self.renderer.decode(sampled_ids)
        turn.predictions = [
            replace(prediction, position=begin + prediction.position, end=begin + prediction.end)
            for prediction in self.protocol.predictions_of(sampled_ids, self.renderer.decode)
        ]
        parsed = self.protocol.parse(turn.response, opened)
        turn.thought, turn.actions, turn.valid = parsed.thought, list(parsed.actions), parsed.valid
        turn.calls = list(parsed.calls)
        self._problem = clean_text(f"Your last answer had {parsed.problem}.") if parsed.problem else ""
        if stop != SampleStop.END:
            self.counters["cut_answers"] += 1
            if not parsed.valid:
                self._problem = f"Your last answer was cut off after {len(sampled_ids)} tokens."
        self.counters["format_errors"] += not parsed.valid
        self.counters["surplus_actions"] += parsed.surplus
        if self.toolbox is not None:
            self.counters["surplus_calls"] += parsed.surplus_calls
        return turn

    def next_turn(self, result: PlayResult) -> Rendered | None:
        """Take what came of the answer, and give the tokens before the next one.

        Returns:
            None when the episode is over; ``stop_reason`` says why.
        """
        turn = self.turns[-1]
        turn.executed, turn.rewards, turn.penalty = list(result.executed), list(result.rewards), result.penalty
        turn.aliases = [list(names) for names in result.aliases]
        turn.foreseeable, turn.meaning = result.foreseeable, result.meaning
        turn.parts, turn.violations, turn.obligations = dict(result.parts), result.violations, result.obligations
        if result.illegal:
            turn.valid = False
            self.counters["illegal_actions"] += 1
            self.counters["skipped_actions"] += result.not_executed
        else:
            self.counters["surplus_actions"] += result.not_executed
        self.counters["ineffective_actions"] += result.ineffective
        self.actions_left -= len(result.executed)
        observation = self._words if result.observation is None else result.observation
        self.final_observation = self._words = observation
        if result.calls:
            return self._told(turn, result)
        if result.executed:
            self.success = result.success
        self.stop_reason = self._stop_reason(result, turn.stop)
        if self.stop_reason is not None:
            if self.keep_ending and result.observation is not None:
                self._end([[Piece(result.observation, Kind.OBSERVATION)]], "user")
            return None
        state = turn.state if result.observation is None else (result.state or "")
        notices = [text for text in (self._problem, result.notice, self._status()) if text]
        shown = Turn(observation, notice=" ".join(notices), state=state)
        return self._show(shown, self.renderer.after_answer(self._sampled_ids, self._pieces(shown)))

    def _told(self, turn: Turn, result: PlayResult) -> Rendered | None:
        """Take the results of tool calls, and give the tokens before the next answer; None when the episode is over."""
        assert self.toolbox is not None
        turn.calls = list(result.calls)
        self._count(result.calls)
        messages, role = self._result_messages(result)
        self.stop_reason = self._stop_reason(result, turn.stop)
        if self.stop_reason is not None:
            if self.keep_ending:
                self._end(messages, role)
            return None
        said = (self._problem, self.toolbox.count_notice(result.calls), result.notice, self._status())
        notices = [text for text in said if text]
        words = "\n".join("".join(piece.text for piece in message) for message in messages)
        shown = Turn(words, notice=" ".join(notices), state=turn.state)
        messages[-1].append(Piece("\n" + shown.notice, Kind.NOTICE))
        prompt = self._show(shown, self.renderer.after_answer(self._sampled_ids, messages[0], role, messages[1:]))
        if prompt is None:
            self.counters["oversized_results"] += 1
        return prompt

    def _result_messages(self, result: PlayResult) -> tuple[list[list[Piece]], Role]:
        """What came of the calls: a message for each where the template takes them, else all in one."""
        told = list(zip(result.calls, result.results, strict=True))
        if self.renderer.takes_results(len(told)):
            return [_result_pieces([one], named=False) for one in told], "tool"
        together = self.renderer.takes_results(1)
        return [_result_pieces(told, named=True)], "tool" if together else "user"

    def _count(self, calls: Sequence[ToolCall]) -> None:
        for call in calls:
            # By tool only for those that there are: a name that the agent made up is no name of a figure.
            if call.error == "limit":
                self.counters["refused_calls"] += 1
            elif call.error == "unknown":
                self.counters["unknown_tools"] += 1
            else:
                self.counters[f"tool_calls/{call.name}"] += 1
                self.counters[f"tool_failures/{call.name}"] += bool(call.error)

    def _equip(self, toolbox: Toolbox) -> None:
        self.toolbox = toolbox
        self.renderer = self.renderer.with_tools(toolbox.schemas)
        self.protocol = replace(self.protocol, tools=True, max_calls_per_turn=toolbox.limits.max_calls_per_turn)
        for name in toolbox.tools:
            self.counters[f"tool_calls/{name}"] += 0
            self.counters[f"tool_failures/{name}"] += 0

    def _tool_lines(self) -> str:
        """The tools, for templates that do not show them, or ask for calls in another form than ours."""
        if self.toolbox is None or self.renderer.shows_tools:
            return ""
        signatures = [json.dumps(schema["function"], ensure_ascii=False) for schema in self.toolbox.schemas]
        return clean_text("\n".join(["Tools, one JSON signature a line:", *signatures]))

    def _stop_reason(self, result: PlayResult, stop: SampleStop) -> StopReason | None:
        if result.terminated:
            return StopReason.TERMINATED
        if result.truncated:
            return StopReason.TRUNCATED
        if stop == SampleStop.CONTEXT:
            return StopReason.CONTEXT_LIMIT
        if len(self.turns) >= self.limits.max_turns:
            return StopReason.TURN_LIMIT
        if self.actions_left < 1:
            return StopReason.ACTION_LIMIT
        return None

    def _end(self, messages: Sequence[Sequence[Piece]], role: Role) -> None:
        """Put the last words of environment or tools into the transcript, as far as they are theirs and there is
        room."""
        rendered = self.renderer.after_answer(self._sampled_ids, messages[0], role, messages[1:])
        spoken = np.flatnonzero(rendered.kinds == Kind.OBSERVATION)
        if len(spoken) and len(self.transcript) + int(spoken[-1]) + 1 <= self.limits.max_context:
            self.transcript.add_rendered(rendered.first(int(spoken[-1]) + 1), len(self.turns))

    def _show(self, turn: Turn, rendered: Rendered) -> Rendered | None:
        if len(self.transcript) + len(rendered) >= self.limits.max_context:
            # Not even one token of an answer would fit. What was not shown is not part of the transcript.
            self.stop_reason = StopReason.CONTEXT_LIMIT
            return None
        self.transcript.add_rendered(rendered, len(self.turns))
        self.turns.append(turn)
        self.counters["defused_tokens"] += rendered.defused
        return rendered

    def _status(self) -> str:
        actions = "1 action" if self.actions_left == 1 else f"{self.actions_left} actions"
        calls = None if self.toolbox is None else self.toolbox.calls_left
        if calls is not None:
            actions += ", 1 tool call" if calls == 1 else f", {calls} tool calls"
        return f"Turn {len(self.turns) + 1} of {self.limits.max_turns}, {actions} left."

    @staticmethod
    def _pieces(turn: Turn) -> list[Piece]:
        return [Piece(turn.observation, Kind.OBSERVATION), Piece("\n" + turn.notice, Kind.NOTICE)]


def _result_pieces(told: Sequence[tuple[ToolCall, ToolResult]], named: bool) -> list[Piece]:
    """The results of calls as the content of a message: the tools' words and, as notices, ours."""
    pieces: list[Piece] = []
    for number, (call, result) in enumerate(told, 1):
        head = f"Result {number}, {' '.join(clean_text(call.name).split())[:64]}:\n" if named else ""
        pieces.append(Piece(("\n" if number > 1 else "") + head, Kind.NOTICE))
        pieces.append(Piece(result.text, Kind.OBSERVATION))
        pieces.append(Piece(("\n" if result.text and result.note else "") + result.note, Kind.NOTICE))
    return [piece for piece in pieces if piece.text]


def protocol_for(renderer: ChatRenderer, protocol: Protocol, limits: Limits) -> Protocol:
    """The protocol as it is used with a model and limits: its number of actions, end tokens and ``</think>`` id."""
    return replace(
        protocol,
        max_actions_per_turn=limits.max_actions_per_turn,
        end_tokens=tuple(dict.fromkeys([*renderer.stop_texts, *protocol.end_tokens])),
        think_close_id=renderer.single_token(THINK_CLOSE),
        predict_open_id=renderer.single_token(PREDICT_OPEN),
    )
