"""Chat format, token-exact: sampled ids are kept, and only what is new is rendered and tokenised.

Rendering the whole conversation anew before every turn is how training drifts away from sampling: a template drops
earlier thinking or a separator, the tokenizer merges an answer's letters in another way, and the ids that are trained
on are no longer those that were sampled. A :class:`ChatRenderer` never looks at an answer's text. It gives the ids of
the opening, and the ids that follow each answer, so that the conversation's ids are

    first(...) + sampled + after_answer(...) + sampled + after_answer(...) + ...

Where the chat template leaves earlier answers alone, these are the ids that the template itself gives for the whole
conversation. Where it rewrites them (Qwen3 and the DeepSeek family drop earlier thinking), earlier answers stay as they
were sampled, and :attr:`ChatRenderer.notes` says so.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from rehearsal.errors import ModelError
from rehearsal.models.chat_calls import shows_json_calls
from rehearsal.models.chat_frames import USER_WORD, Frame, Message, TemplateRefusalError, find_frames, joined_parts
from rehearsal.models.chat_text import Defuser, Piece, Run, joined, kinds_of_tokens, text_is_visible
from rehearsal.trajectory import Kind

__all__ = ["ChatRenderer", "Piece", "Rendered", "Role", "base_template"]

Role = Literal["user", "tool"]

ANSWER_TAGS = (
    "<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<predict>", "</predict>"
)  # fmt: skip
"""Tokens that an answer is made of. Rules may name them, so they are left alone in the harness's own text even where
they are special tokens; in observations they are broken like all special tokens."""

MERGE_SEPARATOR = "\n\n"
"""What stands between the system prompt and the first user message where a template has no system role."""


_MOST_EQUIPPED = 64
_RESPONSE_TAGS = re.compile(r"</?tool_response>")


@dataclass(frozen=True)
class Rendered:
    """Tokens to be put before the next sample.

    Attributes:
        token_ids: int32 of shape (T,).
        kinds: int8 of shape (T,), values of :class:`rehearsal.trajectory.Kind`.
        defused: how many special tokens were spelled out in the pieces and had to be broken.
    """

    token_ids: np.ndarray
    kinds: np.ndarray
    defused: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def first(self, count: int) -> Rendered:
        """The first ``count`` tokens."""
        return Rendered(self.token_ids[:count], self.kinds[:count], self.defused)


@dataclass(frozen=True)
class _Closing:
    """How the fixed text behind an answer begins.

    Attributes:
        upto: the run of added tokens at its beginning: id of each, and the text up to the token's end.
        otherwise: what need not be written once the answer was ended by a token that is not in the run.
    """

    upto: tuple[tuple[int, str], ...]
    otherwise: str


class ChatRenderer:
    """Renders the messages of the environment and the harness around answers that are kept as sampled.

    Special tokens that are spelled out in a message are broken with a blank (``< |im_end|>``), so that text from an
    environment cannot end a turn or begin another; :attr:`Rendered.defused` counts them.

    Args:
        tokenizer: a Hugging Face fast tokenizer with a chat template.
        history: what to do with a template that rewrites earlier answers. "preserve" keeps them as sampled; "refuse"
            raises.
        template_kwargs: variables for the template, such as ``{"enable_thinking": False}``.
        extra_stop_ids: ids that end an answer besides those found in the template, such as ``eos_token_id`` of the
            model's generation config.

    Attributes:
        notes: sentences about the template that a user should know.
        rewrites_history: whether the template, run on the whole conversation, would change earlier answers.
        fast: whether all messages are rendered without running the template.
        has_system_role: whether the template has a place for a system prompt. If not, it goes before the first user
            message with an empty line between.
        has_tool_role: whether ``role="tool"`` can be used.
        shows_tools: whether the template tells the model of the tools that the renderer was made for, see
            :meth:`with_tools`.
        opens_thought: whether the generation prompt ends inside an open ``<think>``.
        stop_token_ids: ids that end an answer, ascending.
        stop_texts: the same as text.

    Raises:
        ModelError: for a tokenizer without a chat template or without offsets, a template that cannot render a
            conversation, and, with history="refuse", one that rewrites earlier answers.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        history: Literal["preserve", "refuse"] = "preserve",
        template_kwargs: dict[str, Any] | None = None,
        extra_stop_ids: Iterable[int] = (),
    ) -> None:
        if history not in ("preserve", "refuse"):
            raise ModelError(f'history must be "preserve" or "refuse", not "{history}".')
        self.tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(
                "The tokenizer is a slow one that cannot tell where in the text a token comes from: "
                "load its fast version (a tokenizer.json)."
            )
        if not tokenizer.chat_template:
            raise ModelError(
                "The tokenizer has no chat template: use an instruction-tuned model, "
                "or set tokenizer.chat_template to the format that the model was trained on."
            )
        # A copy of our own: padding or truncation set on the shared one would change what is tokenised.
        self._backend: Tokenizer = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added: dict[int, str] = {
            index: token.content for index, token in self._backend.get_added_tokens_decoder().items()
        }
        self._special = {
            token.content for token in self._backend.get_added_tokens_decoder().values() if token.special
        } | set(tokenizer.all_special_tokens)
        self._history = history
        self._extra_stop_ids = tuple(int(index) for index in extra_stop_ids)
        self._equipped: dict[str, ChatRenderer] = {}
        self.shows_tools = False
        self._study()

    def _study(self) -> None:
        """Find out all about the template, as it is with the present variables."""
        self._frames = find_frames(self._template_text)
        self.notes: list[str] = list(self._frames.notes)
        self.rewrites_history = bool(self._frames.rewrites)
        self.fast = all(frame.exact for frame in self._frames.frames)
        self.has_system_role = self._frames.opening_system is not None
        self.has_tool_role = "tool" in self._frames.after
        self._results: dict[int, Frame | None] = {}
        self.opens_thought = bool(self._frames.opened_thought)
        self._closing = {role: self._closing_of(frame.parts[0]) for role, frame in self._frames.after.items()}
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(self._find_stops() | set(self._extra_stop_ids)))
        self.stop_texts: tuple[str, ...] = tuple(
            self._backend.id_to_token(i) or "" for i in self.stop_token_ids if self._backend.id_to_token(i)
        )
        self._anchors = {index: self._anchor(index) for index in self.stop_token_ids}
        for closing in self._closing.values():
            for index, _ in closing.upto[:1]:
                self._anchors.setdefault(index, self._anchor(index))
        # Tags are broken too where they are tokens of their own, whether or not the tokenizer calls them special.
        tags = set(ANSWER_TAGS) & set(self._added.values())
        self._defuser = Defuser(self._control_tokens(), self._special | tags)
        self._note_the_rest(self._history)

    # --- the conversation ---------------------------------------------------------------------------------------------

    def first(self, system: Sequence[Piece], user: Sequence[Piece]) -> Rendered:
        """The opening: system prompt, first user message, generation prompt."""
        frame = self._frames.opening_system
        system_runs, defused = self._defuser(system)
        user_runs, more = self._defuser(user)
        if not text_is_visible(system_runs):
            runs = self._frames.opening.fill([user_runs])
        elif frame is not None:
            runs = frame.fill([system_runs, user_runs])
        else:
            runs = self._frames.opening.fill([[*system_runs, (MERGE_SEPARATOR, Kind.TEMPLATE), *user_runs]])
        return self._tokenised(runs, "", 0, defused + more)

    def after_answer(
        self, sampled_ids: Sequence[int] | np.ndarray, pieces: Sequence[Piece], role: Role = "user",
        more: Sequence[Sequence[Piece]] = (),
    ) -> Rendered:  # fmt: skip
        """What follows an answer: the end of its turn as far as it is missing, a message, and the generation prompt.

        Args:
            sampled_ids: the answer's ids as sampled. If the last one ends a turn, it stays and what the template puts
                behind it follows; if the answer was cut off, the tokens that end the turn come first, as ``TEMPLATE``.
            pieces: the content of the message.
            role: whose message it is.
            more: the contents of further messages of that role; see :meth:`takes_results`.
        """
        frame = self._frames.after.get(role)
        if frame is None:
            raise ModelError(f'The chat template has no place for a message of role "{role}": use role "user".')
        if more:
            frame = self._frame_of_results(1 + len(more)) if role == "tool" else None
            if frame is None:
                raise ModelError(f'The chat template takes no {1 + len(more)} messages of role "{role}" in a row.')
        contents, counts = zip(*(self._defuser(content) for content in (pieces, *more)), strict=True)
        defused = sum(counts)
        runs = frame.fill(contents)
        last = int(sampled_ids[-1]) if len(sampled_ids) else -1
        text = runs[0][0]
        closing = self._closing[role]
        if last in self._anchors:
            # What the sampled token stands for is not written again; nor are the tokens that a sample ended by some
            # other token of this kind would have had.
            written = next((upto for index, upto in closing.upto if index == last), closing.otherwise)
            runs[0] = (text.removeprefix(written), Kind.TEMPLATE)
            return self._tokenised(runs, *self._anchors[last], defused)
        if closing.upto and text.startswith(closing.upto[0][1]):
            return self._tokenised(runs, "", 0, defused)
        # The fixed text begins with plain letters: any token that stands alone keeps them from merging.
        return self._tokenised(runs, *next(iter(self._anchors.values()), ("", 0)), defused)

    def takes_results(self, count: int) -> bool:
        """Whether the template has a place for so many messages of tools in a row."""
        return self.has_tool_role and (count == 1 or self._frame_of_results(count) is not None)

    def _frame_of_results(self, count: int) -> Frame | None:
        if count not in self._results:
            self._results[count] = self._frames.find_results(count)
        return self._results[count]

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids, special tokens included."""
        ids = token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(token_ids)
        return self._backend.decode(ids, skip_special_tokens=False)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text on its own, int32 of shape (T,), without special tokens around it."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def plain(self, text: str) -> str:
        """A text as it stands in messages: special tokens that are spelled out in it are broken."""
        return joined(self._defuser([(text, Kind.OBSERVATION)])[0])

    def single_token(self, text: str) -> int | None:
        """The id of a text that the vocabulary has as one added token, such as ``</think>``; None if it has not."""
        return next((index for index, content in self._added.items() if content == text), None)

    def with_tools(self, schemas: Sequence[dict[str, Any]]) -> ChatRenderer:
        """The renderer of conversations in which there are tools; made once for each set of them.

        The template's own section for tools is used where it asks for calls in the form that we read, Hermes' JSON in
        ``<tool_call>``; :attr:`shows_tools` says so. Where it has none, or asks for another form, this renderer itself
        is returned, and the tools are to be told of in the system prompt.

        Args:
            schemas: of the tools, in the form of the OpenAI API. Special tokens that are spelled out in them are
                broken: a description may come from somebody else's server.
        """
        key = json.dumps(schemas)
        if key not in self._equipped:
            tools = _with_each_text(list(schemas), self.plain)
            with_them = copy.copy(self)
            with_them._template_kwargs = {**self._template_kwargs, "tools": tools}
            with_them._equipped = {}
            made = self
            if shows_json_calls(with_them._template_text, tools):
                with_them.shows_tools = True
                with_them._study()
                made = with_them
            while len(self._equipped) >= _MOST_EQUIPPED:
                self._equipped.pop(next(iter(self._equipped)))
            self._equipped[key] = made
        return self._equipped[key]

    # --- how it is done -----------------------------------------------------------------------------------------------

    def _template_text(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, **self._template_kwargs
            )
        except Exception as error:  # a template is a program of somebody else: it may raise anything
            raise TemplateRefusalError(str(error).strip() or type(error).__name__) from error
        return str(text)

    def _tokenised(self, runs: Sequence[Run], anchor: str, anchor_tokens: int, defused: int) -> Rendered:
        # The token before the text is tokenised with it and dropped: what stands at the beginning of a text is treated
        # in its own way by some tokenizers, and some special tokens swallow the blanks behind them.
        whole = [(anchor, Kind.TEMPLATE), *runs] if anchor else runs
        encoding = self._backend.encode(joined(whole), add_special_tokens=False)
        token_ids = np.array(encoding.ids[anchor_tokens:], dtype=np.int32)
        kinds = kinds_of_tokens(encoding, whole)[anchor_tokens:]
        return Rendered(token_ids, kinds, defused)

    def _anchor(self, index: int) -> tuple[str, int]:
        """A special token as text, and how many tokens the tokenizer makes of it when nothing stands before it."""
        text = self._backend.id_to_token(index)
        if text is None:
            raise ModelError(f"The token id {index} is to end an answer, but the tokenizer does not have it.")
        ids = self._backend.encode(text, add_special_tokens=False).ids
        # A vocabulary entry that is no added token cannot be spelled out alone; then the text begins without it.
        return (text, len(ids)) if ids and ids[-1] == index else ("", 0)

    def _closing_of(self, text: str) -> _Closing:
        """How a fixed text that follows an answer ends the answer's turn."""
        found = self._added_tokens_in(text)
        upto: list[tuple[int, str]] = []
        end = 0
        for index, start in found:
            # The run of added tokens that the text begins with; blanks may stand before and between them.
            if text[end:start].strip():
                break
            end = start + len(self._added[index])
            upto.append((index, text[:end]))
        # GLM ends an answer with the <|user|> that opens the next message: such a token is written after any other.
        opens = len(found) == 1 and not self._added_tokens_in(self._frames.end)
        return _Closing(tuple(upto), upto[0][1] if upto and not opens else "")

    def _added_tokens_in(self, text: str) -> list[tuple[int, int]]:
        """Added tokens in a text: (id, position of the first character)."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        # Some vocabularies have runs of blanks as added tokens; those are no marks of a turn.
        found = [(index, span[0]) for index, span in pairs if index in self._added and self._added[index].strip()]
        return [(index, text.index(self._added[index], start)) for index, start in found]

    def _find_stops(self) -> set[int]:
        stops: set[int] = set()
        end = self._closing_of(self._frames.end).upto
        if end:
            # What ends the last answer of a conversation is what the model learnt to say (GPT-OSS: <|return|>).
            stops.add(end[0][0])
        else:
            stops |= {closing.upto[0][0] for closing in self._closing.values() if closing.upto}
        if self.tokenizer.eos_token_id is not None:
            stops.add(int(self.tokenizer.eos_token_id))
        return stops

    def _control_tokens(self) -> set[str]:
        fixed = "\n".join([self._frames.end, *(joined_parts(frame) for frame in self._frames.frames)])
        control = {token for token in self._added.values() if token.strip() and token in fixed}
        control |= set(self.stop_texts)
        if self.shows_tools and "tool" in self._frames.after:
            # Plain letters in some vocabularies; a result that spells them would pass for another one.
            control |= set(_RESPONSE_TAGS.findall(joined_parts(self._frames.after["tool"])))
        control |= {token for token in (self.tokenizer.bos_token, self.tokenizer.eos_token) if token}
        return control - set(ANSWER_TAGS)

    def _note_the_rest(self, history: str) -> None:
        if self._frames.rewrites:
            what = " and ".join(self._frames.rewrites)
            if history == "refuse":
                raise ModelError(
                    f"The chat template {what}, so it would not show the model what was sampled: "
                    'use history="preserve", or a template that leaves earlier answers alone.'
                )
            self.notes.append(
                f"The chat template {what}; here earlier answers stay exactly as they were sampled, so a server that "
                "runs the template on whole conversations shows the model something else."
            )
        own = default = ""
        if self.shows_tools:
            return  # what the template adds is the tools, and the rest was told without them
        opening, opening_system = self._frames.opening, self._frames.opening_system
        if opening_system is None:
            own = self._own_words(opening.parts[0])
        else:
            own = self._own_words(opening_system.parts[0])
            before, between = opening_system.parts[:2]
            default = self._own_words(opening.parts[0].removeprefix(before).removesuffix(between))
        if own:
            self.notes.append(f'The chat template puts words of its own before every conversation: "{own}".')
        elif default:
            self.notes.append(f'Without a system prompt the chat template puts in one of its own: "{default}".')
        if "strftime_now" in str(self.tokenizer.chat_template):
            self.notes.append("The chat template can write today's date: it is fixed when the model is loaded.")
        if not self.stop_token_ids:
            self.notes.append("No token ends an answer: every answer takes all the tokens that it may.")
        if not self._whole_equals_parts():
            self.notes.append(
                "The tokenizer joins letters across the borders of messages, so the ids of a conversation differ from "
                "those of its whole text; the ids that were sampled are kept."
            )

    def _own_words(self, text: str) -> str:
        for token in sorted(self._added.values(), key=len, reverse=True):
            text = text.replace(token, " ") if token.strip() else text
        words = text.split()
        # Role names are a word or two.
        return " ".join(words)[:80] if len(words) > 3 else ""

    def _whole_equals_parts(self) -> bool:
        """Whether the parts' ids, put together, are those of the whole text, on one plain conversation."""
        closing = self._closing["user"].upto
        answer = "Left" + (closing[0][1] if closing else "")
        answer_ids = self._backend.encode(answer, add_special_tokens=False).ids
        pieces = [Piece(USER_WORD, Kind.OBSERVATION)]
        parts = [*self.first([], pieces).token_ids, *answer_ids, *self.after_answer(answer_ids, pieces).token_ids]
        runs = [(USER_WORD, Kind.OBSERVATION)]
        text = joined(self._frames.opening.fill([runs])) + "Left" + joined(self._frames.after["user"].fill([runs]))
        return parts == self._backend.encode(text, add_special_tokens=False).ids


def _with_each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _with_each_text(item, change) for key, item in value.items()}
    return [_with_each_text(item, change) for item in value] if isinstance(value, list | tuple) else value


def base_template() -> str:
    """The chat template of the models that ship with the package: ChatML with tools, earlier answers left alone."""
    return (resources.files("rehearsal.models") / "base_template.jinja").read_text(encoding="utf-8")
