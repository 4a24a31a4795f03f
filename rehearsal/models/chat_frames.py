"""What a chat template puts around messages, found by rendering probe conversations.

A template is a program, and running it for every turn of every episode costs more than sampling does on a small model.
Nearly all templates only put fixed text around content (some trim the content first), so that text is found once, by
rendering sentinels, and checked against the template on contents that are likely to trip it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rehearsal.errors import ModelError
from rehearsal.models.chat_text import CHANGES, Run, joined, located, text_is_visible
from rehearsal.trajectory import Kind

Message = dict[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""Renders a conversation to text; the flag asks for a generation prompt."""

# Words that no template contains, that no template changes, and none of which contains another.
SYSTEM_WORD = "Zqsystem"
USER_WORD = "Zquser"
ANSWER_WORD = "Zqanswer"
NEXT_WORD = "Zqnext"
THOUGHT_WORD = "Zqthought"

CONTENT_PROBES = (
    "Zqa b",
    " Zqa",
    "Zqa ",
    "\n\n\tZqa \n b\n",
    'Zqé "汉" \\n {{ x }} <b> & \' Zqz',
    "Zqa\n\n===\n_ P # G",
    "Zqa|Zqb [INST] </think> Zqc",
)
BLANK_PROBES = ("", " \n")


class TemplateRefusalError(Exception):
    """The template raised on a probe conversation; the message is what it said."""


@dataclass
class Frame:
    """Fixed text around one or two contents.

    Attributes:
        parts: the template's text before, between and after the contents; one more than there are contents.
        changes: by content, the name of what the template does to it (a key of ``CHANGES``).
        exact: whether filling the parts gave the template's own text for every probe. If not, the template is run for
            every message.
        blank_exact: the same for contents without any letters.
        region: runs the template: contents to the text that this frame stands for.
    """

    parts: tuple[str, ...]
    changes: tuple[str, ...]
    exact: bool
    blank_exact: bool
    region: Callable[[Sequence[str]], str] = field(repr=False)

    def fill(self, contents: Sequence[Sequence[Run]]) -> list[Run]:
        """The runs of the rendered text with these contents in it."""
        blank = any(not text_is_visible(content) for content in contents)
        if not self.exact or (blank and not self.blank_exact):
            return self._rendered(contents)
        return self._filled(contents)

    def _filled(self, contents: Sequence[Sequence[Run]]) -> list[Run]:
        runs: list[Run] = [(self.parts[0], Kind.TEMPLATE)]
        for content, change, part in zip(contents, self.changes, self.parts[1:], strict=True):
            runs += CHANGES[change](content)
            runs.append((part, Kind.TEMPLATE))
        return runs

    def _rendered(self, contents: Sequence[Sequence[Run]]) -> list[Run]:
        text = self.region([joined(content) for content in contents])
        position = len(self.parts[0]) if text.startswith(self.parts[0]) else 0
        runs: list[Run] = [(text[:position], Kind.TEMPLATE)]
        for index, content in enumerate(contents):
            part = self.parts[index + 1]
            last = index == len(contents) - 1
            end = text.rfind(part, position) if last else text.find(part, position)
            end = len(text) if end < 0 or not part else end
            runs += located(content, text[position:end])
            position = end
        runs.append((text[position:], Kind.TEMPLATE))
        return runs

    @classmethod
    def find(cls, words: Sequence[str], region: Callable[[Sequence[str]], str]) -> Frame | None:
        """Find the frame of a region, or None where the template refuses it or does not show the words in order."""
        try:
            text = region(words)
        except TemplateRefusalError:
            return None
        parts: list[str] = []
        for word in words:
            before, found, text = text.partition(word)
            if not found or word in text:
                return None
            parts.append(before)
        parts.append(text)
        changes: list[str] = []
        exact = True
        for slot in range(len(words)):
            change = _change_of(slot, words, parts, region)
            exact = exact and change is not None
            changes.append(change or "verbatim")
        frame = cls(tuple(parts), tuple(changes), exact, False, region)
        frame.blank_exact = exact and all(
            frame._agrees(words, slot, probe) for slot in range(len(words)) for probe in BLANK_PROBES
        )
        return frame

    def _agrees(self, words: Sequence[str], slot: int, probe: str) -> bool:
        contents = [probe if index == slot else word for index, word in enumerate(words)]
        try:
            return self.region(contents) == joined(self._filled([[(text, Kind.TEMPLATE)] for text in contents]))
        except TemplateRefusalError:
            return False


def _change_of(
    slot: int, words: Sequence[str], parts: Sequence[str], region: Callable[[Sequence[str]], str]
) -> str | None:
    """The name of the change that a template makes to the content of a slot, or None if it is none of those known."""
    for name in CHANGES:
        names = tuple(name if index == slot else "verbatim" for index in range(len(words)))
        frame = Frame(tuple(parts), names, True, False, region)
        if all(frame._agrees(words, slot, probe) for probe in CONTENT_PROBES):
            return name
    return None


@dataclass
class ChatFrames:
    """All that is known about a chat template.

    Attributes:
        opening: slots (user): a conversation without a system prompt, up to the end of the generation prompt.
        opening_system: slots (system, user); None where the template has no system role.
        after: by role, slots (message): from the end of an answer's content to the end of the next generation prompt.
        end: the text that follows an answer at the end of a conversation.
        opened_thought: the end of the generation prompt from its unclosed ``<think>`` on; "" if it opens no thought.
        rewrites: what the template does to earlier answers, as verbs ("drops the thinking of earlier turns"); empty if
            it leaves them alone.
        notes: sentences about everything else that a user may want to know.
    """

    opening: Frame
    opening_system: Frame | None
    after: dict[str, Frame]
    end: str
    opened_thought: str
    rewrites: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    find_results: Callable[[int], Frame | None] = field(default=lambda count: None, repr=False)
    """Finds the frame of so many messages of tools in a row, as in ``after``; None where the template has none."""

    @property
    def frames(self) -> list[Frame]:
        return [self.opening, *([self.opening_system] if self.opening_system else []), *self.after.values()]


def find_frames(render: Render) -> ChatFrames:
    """Find everything about a template by rendering probes.

    Raises:
        ModelError: if the template cannot render a user message, or a conversation that goes on after an answer.
    """
    opening = Frame.find([USER_WORD], lambda texts: render([_message("user", texts[0])], True))
    opening_system = Frame.find(
        [SYSTEM_WORD, USER_WORD],
        lambda texts: render([_message("system", texts[0]), _message("user", texts[1])], True),
    )
    if opening is None:
        # A template may insist on a system prompt, but it has to show a user's words.
        if opening_system is None:
            raise ModelError("The chat template cannot render a user message, so no conversation can begin with it.")
        insisting = opening_system
        opening = Frame.find([USER_WORD], lambda texts: insisting.region(["", texts[0]])) or insisting
    notes: list[str] = []
    start = [_message("user", USER_WORD)]
    if opening_system is None:
        notes.append("The chat template has no system role: the system prompt is put before the first user message.")
    else:
        start = [_message("system", SYSTEM_WORD), *start]

    after = _after_frame(render, start, "user")
    if after is not None and SYSTEM_WORD in joined_parts(after):
        start = start[1:]
        after = _after_frame(render, start, "user")
        rewrites = ["moves the system prompt to the latest user message"]
    else:
        rewrites = []
    if after is None:
        raise ModelError("The chat template cannot render a conversation that goes on after an answer.")
    frames = {"user": after}
    tool = _after_frame(render, start, "tool")
    if tool is not None:
        if _is_stable(render, start, "tool", tool):
            frames["tool"] = tool
        else:
            notes.append(
                "The chat template writes a tool's result in a way that depends on earlier ones: "
                "give tool results in user messages with this model."
            )
    if not _is_stable(render, start, "user", after):
        notes.append("The chat template writes later turns differently from the second one; the second one is used.")

    tail = (opening_system or opening).parts[-1]
    opened = tail[tail.rfind("<think>") :] if tail.rfind("<think>") > tail.rfind("</think>") else ""
    found = ChatFrames(opening, opening_system, frames, _end(render, start), opened, rewrites, notes)
    if "tool" in frames:
        found.find_results = partial(_results_frame, render, start)
    found.rewrites += _history_rewrites(render, found)
    if _refuses(render, [*start, _message("user", NEXT_WORD)]):
        notes.append("The chat template accepts only user and assistant messages in turn.")
    if not all(frame.exact for frame in found.frames):
        notes.append("The chat template changes messages in its own way, so it is run for every turn (slow).")
    return found


def joined_parts(frame: Frame) -> str:
    """All the fixed text of a frame, one part a line."""
    return "\n".join(frame.parts)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _after_frame(
    render: Render, start: Sequence[Message], role: str, turns: int = 1, words: Sequence[str] = (NEXT_WORD,)
) -> Frame | None:
    """The frame of the messages, one for each word, that follow the answer of turn number ``turns``."""
    history = list(start)
    for _ in range(turns - 1):
        history += [_message("assistant", "Zqearlier"), *(_message(role, "Zqmiddle") for _ in words)]

    def region(texts: Sequence[str]) -> str:
        messages = [_message(role, text) for text in texts]
        text = render([*history, _message("assistant", ANSWER_WORD), *messages], True)
        _, found, after = text.partition(ANSWER_WORD)
        if not found:
            raise TemplateRefusalError("the template does not show earlier answers")
        return after

    return Frame.find(words, region)


def _results_frame(render: Render, start: Sequence[Message], count: int) -> Frame | None:
    words = [f"Zq{number}result" for number in range(count)]
    frame = _after_frame(render, start, "tool", words=words)
    return frame if frame is not None and _is_stable(render, start, "tool", frame, words) else None


def _is_stable(
    render: Render, start: Sequence[Message], role: str, frame: Frame, words: Sequence[str] = (NEXT_WORD,)
) -> bool:
    """Whether the template writes the messages after the second answer as it does those after the first."""
    later = _after_frame(render, start, role, turns=2, words=words)
    return later is not None and later.parts == frame.parts


def _refuses(render: Render, messages: Sequence[Message]) -> bool:
    try:
        render(messages, True)
    except TemplateRefusalError:
        return True
    return False


def _end(render: Render, start: Sequence[Message]) -> str:
    """What follows an answer that ends a conversation."""
    try:
        text = render([*start, _message("assistant", ANSWER_WORD)], False)
    except TemplateRefusalError:
        return ""
    return text.partition(ANSWER_WORD)[2]


def _history_rewrites(render: Render, frames: ChatFrames) -> list[str]:
    """What the template does to an answer once the conversation has gone on, as verbs."""
    opened = frames.opened_thought
    thought = f"{THOUGHT_WORD}</think><answer>{ANSWER_WORD}</answer>"
    spaced = f"{THOUGHT_WORD}\n</think>\n\n{ANSWER_WORD}"
    lead, spaced_lead = (opened, opened) if opened else ("<think>", "<think>\n")
    answers = {
        "thought": (lead, thought),
        "spaced": (spaced_lead, spaced),
        "plain": ("", ANSWER_WORD),
        "blanks": ("", f" {ANSWER_WORD} \n"),
    }
    kept: dict[str, bool] = {}
    shown: dict[str, str] = {}
    for name, (head, answer) in answers.items():
        if opened and name in ("plain", "blanks"):
            # Inside an opened thought a plain answer is not a form that the model would sample.
            head, answer = opened, f"{THOUGHT_WORD}\n</think>\n\n{answer}"
        messages = [_message("user", USER_WORD), _message("assistant", head + answer), _message("user", NEXT_WORD)]
        runs: list[Run] = [(USER_WORD, Kind.OBSERVATION)]
        first = frames.opening.fill([runs])
        if frames.opening_system is not None:
            messages.insert(0, _message("system", SYSTEM_WORD))
            first = frames.opening_system.fill([[(SYSTEM_WORD, Kind.SYSTEM)], runs])
        sampled = answer if opened else head + answer
        after = frames.after["user"].fill([[(NEXT_WORD, Kind.OBSERVATION)]])
        try:
            shown[name] = render(messages, True)
        except TemplateRefusalError as refusal:
            return [f"refuses a conversation of several turns ({refusal})"]
        kept[name] = shown[name] == joined(first) + sampled + joined(after)
    rewrites: list[str] = []
    if THOUGHT_WORD not in shown["thought"] or THOUGHT_WORD not in shown["spaced"]:
        rewrites.append("drops the thinking of earlier turns")
    elif not (kept["thought"] and kept["spaced"]):
        rewrites.append("writes the thinking of earlier turns in another form")
    if not kept["plain"] and not opened:
        rewrites.append("writes earlier answers in another form")
    elif not kept["blanks"] and not rewrites:
        rewrites.append("trims blanks around earlier answers")
    return rewrites
