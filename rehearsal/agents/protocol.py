"""The format of an agent's answers: a thought, then one or several actions, or calls of tools.

    <think>The goal is to the left.</think><answer>Left || Down</answer>
    <think>What is a pin code?</think><tool_call>{"name": "search", "arguments": {"query": "pin code"}}</tool_call>

Two things are made of a sampled answer, and they never depend on each other: :meth:`Protocol.parse` reads the text for
what the agent wants to do, and :meth:`Protocol.kinds_of` says of each sampled token whether it belongs to the thought
or to the action. Neither changes the answer: what was sampled is what is kept and trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rehearsal.agents.calls import CALL_CLOSE, CALL_FORM, CALL_OPEN, parse_calls
from rehearsal.agents.rehearse import PREDICT_CLOSE, PREDICT_OPEN, find_predictions
from rehearsal.environments.base import TextEnv
from rehearsal.errors import RecipeError
from rehearsal.trajectory import Kind, Prediction, ToolCall

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<|return|>", "<end_of_turn>", "</s>",
    "<|user|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
"""Tokens that end a turn in common chat formats; taken off the end of an answer before it is read."""


@dataclass(frozen=True)
class Parsed:
    """What an answer says.

    Attributes:
        thought: the text inside the thought, trimmed; also of an answer that broke the format later on.
        actions: the actions, trimmed, in order, at most as many as a turn allows; empty if the answer is not valid.
        valid: whether the answer kept the format.
        problem: what is wrong with it, as what an answer can *have* ("no <answer> tag"); "" if nothing is. Too many
            actions are told here too, although the answer stays valid.
        surplus: how many actions there were beyond those allowed; they are left out.
        calls: the tools that are called, in order, at most as many as a turn allows; an answer has actions or calls.
        surplus_calls: how many calls there were beyond those allowed; they are left out.
    """

    thought: str = ""
    actions: tuple[str, ...] = ()
    valid: bool = False
    problem: str = ""
    surplus: int = 0
    calls: tuple[ToolCall, ...] = ()
    surplus_calls: int = 0


@dataclass(frozen=True)
class Protocol:
    """The answer format and what breaking it costs.

    An answer that breaks the format has no actions at all: guessing what a broken answer meant would reward breaking
    it. (RAGEN's parser searches the text for the tags and takes what is between them; text around them is cut out of
    the conversation there, which is not possible where the sampled tokens are kept.) More actions than a turn allows
    are no breach: the first ones count, the rest are left out and counted.

    Attributes:
        thinking: whether a thought comes before the answer. Without one the format is ``<answer>...</answer>`` alone.
        action_separator: what stands between several actions of one answer.
        max_actions_per_turn: how many actions of one answer count.
        format_penalty: what an unreadable answer, or one with an illegal action, adds to the turn's reward; not
            positive.
        end_tokens: texts of the tokens that end a turn; they are taken off before an answer is read.
        think_close_id: the id of ``</think>`` where it is one token: finds the end of a thought faster.
        rehearse: whether the agent is asked to foretell, inside its thought, what the environment will answer; see
            :mod:`rehearsal.agents.rehearse`.
        predict_open_id: the id of ``<predict>`` where it is one token.
        tools: whether an answer may call tools in place of acting. An agent that has tools sets it.
        max_calls_per_turn: how many calls of one answer count.
        free_text: whether any text is an action. Where one action is allowed, it is then the whole answer, with what
            looks like a separator or an answer tag: norms, code and Markdown have both. An agent sets it by its
            environment.

    Raises:
        RecipeError: for settings that cannot be used.
    """

    thinking: bool = True
    action_separator: str = "||"
    max_actions_per_turn: int = 1
    format_penalty: float = -0.1
    end_tokens: tuple[str, ...] = END_TOKENS
    think_close_id: int | None = None
    rehearse: bool = False
    predict_open_id: int | None = None
    tools: bool = False
    max_calls_per_turn: int = 4
    free_text: bool = False

    def __post_init__(self) -> None:
        if self.max_actions_per_turn < 1:
            raise RecipeError(f"max_actions_per_turn must be at least 1, not {self.max_actions_per_turn}.")
        if self.max_calls_per_turn < 1:
            raise RecipeError(f"max_calls_per_turn must be at least 1, not {self.max_calls_per_turn}.")
        if not math.isfinite(self.format_penalty) or self.format_penalty > 0:
            raise RecipeError(f"format_penalty must be zero or negative, not {self.format_penalty}.")
        if self.rehearse and not self.thinking:
            raise RecipeError("To rehearse needs a thought to do it in; switch thinking on, or rehearse off.")
        if not self.action_separator.strip():
            raise RecipeError("action_separator must have a character that is not a blank.")
        if any(tag in self.action_separator or self.action_separator in tag for tag in TAGS):
            raise RecipeError(f'action_separator "{self.action_separator}" cannot be told from the tags of the format.')

    def format_instructions(self, env: TextEnv | None = None) -> str:
        """One short line that tells the agent how to answer.

        Args:
            env: the environment that it is for; one where any text is an action gets "your answer" for "action".
        """
        word = "your answer" if env is not None and env.legal_actions() is None else "action"
        thought = f"{THINK_OPEN}...{THINK_CLOSE}" if self.thinking else ""
        line = f"Answer as {thought}{ANSWER_OPEN}{word}{ANSWER_CLOSE}"
        if self.max_actions_per_turn > 1:
            line += f", up to {self.max_actions_per_turn} actions separated by {self.action_separator}"
        if self.rehearse:
            line += f". In the thought rehearse actions, each with the answer on a new line: {PREDICT_OPEN}{word}"
            line += f"\nits answer{PREDICT_CLOSE}"
        if self.tools:
            line += f"; or call a tool as {thought}{CALL_FORM}"
            if self.max_calls_per_turn > 1:
                line += f", up to {self.max_calls_per_turn} calls"
        return line + "."

    def without_end(self, response_text: str) -> str:
        """The answer without the tokens that end the turn, and without blanks around it."""
        ends = tuple(token for token in self.end_tokens if token)
        end = len(response_text)
        # By position, not by cutting: an answer may be nothing but a million of these tokens.
        while end > 0:
            if response_text[end - 1].isspace():
                end -= 1
            elif ends and response_text.endswith(ends, 0, end):
                end -= max(len(token) for token in ends if response_text.endswith(token, 0, end))
            else:
                break
        return response_text[:end].lstrip()

    def parse(self, response_text: str, opened_thought: bool = False) -> Parsed:
        """Read an answer. Never raises, whatever the text, and takes time in proportion to its length.

        The thought ends at the first ``</think>``; what is in it is not looked at. The answer ends at the first
        ``</answer>``; a single free text may mention ``<answer>`` and ends at the first ``</answer>`` that belongs to
        none it mentions, or else at the last one. Blanks may stand around both, and nothing else. With tools, calls may
        stand in place of the answer, see :func:`rehearsal.agents.calls.parse_calls`.

        Args:
            response_text: the sampled answer, decoded with its special tokens.
            opened_thought: whether the generation prompt has already opened the thought. There is a thought then, even
                where the protocol does not ask for one.
        """
        text = self.without_end(response_text)
        thought = ""
        if self.thinking or opened_thought:
            opened = text.startswith(THINK_OPEN)
            if not opened and not opened_thought:
                if not text:
                    return Parsed(problem="nothing in it")
                return Parsed(problem="text outside the tags" if THINK_OPEN in text else f"no {THINK_OPEN} tag")
            text = text[len(THINK_OPEN) :] if opened else text
            thought, closed, text = text.partition(THINK_CLOSE)
            thought = thought.strip()
            if not closed:
                return Parsed(thought, problem="an unclosed thought")
            text = text.strip()
        elif not text:
            return Parsed(problem="nothing in it")
        if self.tools and text.startswith(CALL_OPEN):
            return self._called(thought, text)
        before, opened_answer, rest = text.partition(ANSWER_OPEN)
        if not opened_answer:
            if self.tools and CALL_OPEN not in text:
                return Parsed(thought, problem=f"neither {ANSWER_OPEN} nor {CALL_OPEN}")
            if self.tools:
                return Parsed(thought, problem="text outside the tags")
            return Parsed(thought, problem=f"no {ANSWER_OPEN} tag")
        answer, closed_answer, after = self._ended(rest)
        if self.tools and not before and after.strip().startswith(CALL_OPEN):
            return Parsed(thought, problem="both an answer and tool calls")
        if before or after.strip():
            return Parsed(thought, problem="text outside the tags")
        if not closed_answer:
            return Parsed(thought, problem="an unclosed answer")
        if any(tag in answer for tag in self._foreign_tags):
            return Parsed(thought, problem="a tag inside the answer")
        parts = [answer] if self._one_text else answer.split(self.action_separator)
        actions = tuple(part.strip() for part in parts if part.strip())
        if not actions:
            return Parsed(thought, problem="an empty answer")
        surplus = max(0, len(actions) - self.max_actions_per_turn)
        problem = f"too many actions: {len(actions)}, {self.max_actions_per_turn} allowed" if surplus else ""
        return Parsed(thought, actions[: self.max_actions_per_turn], True, problem, surplus)

    @property
    def _one_text(self) -> bool:
        """Whether an answer is one action, whatever stands in it."""
        return self.free_text and self.max_actions_per_turn == 1

    @property
    def _foreign_tags(self) -> tuple[str, ...]:
        """What cannot stand in an answer."""
        tags = (THINK_OPEN, THINK_CLOSE) if self._one_text else TAGS
        return (*tags, CALL_OPEN, CALL_CLOSE) if self.tools else tags

    def _ended(self, rest: str) -> tuple[str, str, str]:
        """What follows ``<answer>`` as the answer, its end tag if there is one, and what follows that."""
        if not self._one_text:
            return rest.partition(ANSWER_CLOSE)
        *inner, after = rest.split(ANSWER_CLOSE)
        if not inner:
            return rest, "", ""
        mentioned = 0
        for number, part in enumerate(inner[:-1]):
            mentioned += part.count(ANSWER_OPEN)
            if mentioned <= number:  # this end tag belongs to no tag that the answer mentions, so it ends the answer
                behind = ANSWER_CLOSE.join([*inner[number + 1 :], after])
                return ANSWER_CLOSE.join(inner[: number + 1]), ANSWER_CLOSE, behind
        return ANSWER_CLOSE.join(inner), ANSWER_CLOSE, after

    def _called(self, thought: str, text: str) -> Parsed:
        read = parse_calls(text)
        if read.problem:
            return Parsed(thought, problem=f"{read.problem}; a call is {CALL_FORM}")
        surplus = max(0, len(read.calls) - self.max_calls_per_turn)
        problem = f"too many calls: {len(read.calls)}, {self.max_calls_per_turn} allowed" if surplus else ""
        return Parsed(thought, (), True, problem, 0, read.calls[: self.max_calls_per_turn], surplus)

    def predictions_of(
        self, sampled_ids: Sequence[int] | np.ndarray, decode: Callable[[Sequence[int]], str]
    ) -> list[Prediction]:
        """The predictions in an answer's thought; none unless the protocol asks for them. Positions are within the
        answer."""
        if not self.rehearse:
            return []
        return find_predictions(
            sampled_ids, decode, separator=None if self._one_text else self.action_separator, end=THINK_CLOSE,
            open_id=self.predict_open_id,
        )  # fmt: skip

    def kinds_of(
        self,
        sampled_ids: Sequence[int] | np.ndarray,
        decode: Callable[[Sequence[int]], str],
        opened_thought: bool = False,
    ) -> np.ndarray:
        """The kind of each sampled token: ``THOUGHT`` up to the end of the first ``</think>``, ``ACTION`` after it.

        The token that completes ``</think>`` belongs to the thought, also where it carries letters beyond it. A thought
        that is never closed takes all the tokens. An answer that neither opens nor closes a thought has none, so all
        its tokens are ``ACTION``, as they are where no thought is asked for.

        Args:
            sampled_ids: ids of one answer, in the order they were sampled.
            decode: ids to text, special tokens included.
            opened_thought: whether the generation prompt has already opened the thought.

        Returns:
            int8 of shape (T,). Takes one or two decodings where ``think_close_id`` is known, else O(log T) of them.
        """
        ids = [int(index) for index in sampled_ids]
        kinds = np.full(len(ids), int(Kind.ACTION), dtype=np.int8)
        if not ids or not (self.thinking or opened_thought):
            return kinds
        # The end of the thought lies in (low, high]: a prefix of `high` tokens contains "</think>", one of `low` does
        # not. Once a prefix contains the tag, so does every longer one, which is what a binary search asks for.
        low, high = 0, len(ids)
        if self.think_close_id is not None and self.think_close_id in ids:
            high = ids.index(self.think_close_id) + 1
            if THINK_CLOSE not in decode(ids[: high - 1]):
                low = high - 1
        else:
            text = decode(ids)
            if THINK_CLOSE not in text:
                if opened_thought or text.lstrip().startswith(THINK_OPEN):
                    kinds[:] = int(Kind.THOUGHT)
                return kinds
        while high - low > 1:
            middle = (low + high) // 2
            if THINK_CLOSE in decode(ids[:middle]):
                high = middle
            else:
                low = middle
        kinds[:high] = int(Kind.THOUGHT)
        return kinds
