"""Looking ahead: what each fork sees, what comes back, and that the agent's own session notices nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rehearsal.agents.agent import Agent, Limits
from rehearsal.agents.lookahead import Future, Lookahead, imagine, thought_of
from rehearsal.agents.play import PlayResult
from rehearsal.agents.protocol import Protocol
from rehearsal.agents.rehearse import find_predictions
from rehearsal.errors import GenerationError, RecipeError
from rehearsal.generation.local import LocalEngine, LocalSession
from rehearsal.generation.sampling import SamplingParams
from rehearsal.generation.session import Sampled
from rehearsal.models.chat import ChatRenderer
from rehearsal.trajectory import SampleStop

PROTOCOL = Protocol(rehearse=True, max_actions_per_turn=2)
PARAMS = SamplingParams()
START = "<|im_start|>user\nWhere to?<|im_end|>\n<|im_start|>assistant\n"

Say = Callable[[str], str | Exception | None]


class Scripted:
    """A session whose every sample is what a function makes of the context: a text, an error, or silence for ever.

    The log-prob of the n-th token of a sample is -n.
    """

    def __init__(self, renderer: Any, say: Say, room: int = 10_000, family: list[Scripted] | None = None) -> None:
        self.renderer, self.say, self.most = renderer, say, room
        self.family = [] if family is None else family
        self.family.append(self)
        self.key = 0
        self.ids: list[int] = []
        self.seen = ""
        self.params: SamplingParams | None = None
        self.closed = False

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def room(self) -> int:
        return self.most - len(self.ids)

    def extend(self, token_ids: Sequence[int] | np.ndarray) -> None:
        assert len(token_ids) <= self.room
        self.ids += [int(index) for index in token_ids]

    async def sample(self, params: SamplingParams) -> Sampled:
        assert not self.closed
        self.seen, self.params = self.renderer.decode(self.ids), params
        said = self.say(self.seen)
        await asyncio.sleep(0)
        if said is None:
            await asyncio.Event().wait()
        if isinstance(said, Exception):
            raise said
        ids = self.renderer.encode(said).tolist()
        ends = [at + 1 for at, index in enumerate(ids) if index in params.stop_token_ids]
        stop = SampleStop.END if ends else SampleStop.LENGTH
        ids = ids[: ends[0]] if ends else ids
        if len(ids) > min(params.max_tokens, self.room):
            stop = SampleStop.CONTEXT if self.room <= params.max_tokens else SampleStop.LENGTH
            ids = ids[: min(params.max_tokens, self.room)]
        self.ids += ids
        return Sampled(np.array(ids, np.int32), -np.arange(1, len(ids) + 1, dtype=np.float32), stop)

    def fork(self, key: int) -> Scripted:
        child = Scripted(self.renderer, self.say, self.most, self.family)
        child.ids, child.key = list(self.ids), key
        return child

    def close(self) -> None:
        self.closed = True

    # What tests ask

    @property
    def sampled(self) -> list[Scripted]:
        """The forks that were sampled from."""
        return [one for one in self.family if one.params is not None]

    @property
    def open(self) -> list[Scripted]:
        """The forks that were not closed."""
        return [one for one in self.family if one is not self and not one.closed]


def scripted(renderer: Any, say: Say, room: int = 10_000) -> Scripted:
    session = Scripted(renderer, say, room)
    session.extend(renderer.encode(START))
    return session


def run(main: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(main, 60)

    return asyncio.run(bounded())


def look(
    session: Any, renderer: Any, actions: Sequence[str], settings: Lookahead, *, protocol: Protocol = PROTOCOL,
    key: int = 7, **options: Any,
) -> list[Future]:  # fmt: skip
    return run(imagine(session, renderer, protocol, actions, settings, PARAMS, key, **options))


def world(context: str) -> str:
    """Says ``ACTION!`` to an action, and proposes first Up and then Down."""
    last = context.rpartition("<|im_start|>")[2]
    if last.endswith("<answer>"):
        return "Up</answer>" if "Left" in context else "Down</answer>"
    return f"{last.partition('<predict>')[2].strip()}!</predict> So"


def predicting(past: str, action: str) -> str:
    return f"{START}{past}<think><predict>{action}\n"


def taken(action: str, told: str) -> str:
    return (
        f"<think></think><answer>{action}</answer><|im_end|>\n"
        f"<|im_start|>user\n{told}<|im_end|>\n<|im_start|>assistant\n"
    )


# One level


def test_each_action_is_foretold_in_a_fork_of_its_own(renderer: Any) -> None:
    session = scripted(renderer, world)
    futures = look(session, renderer, ["Left", "Up || Down"], Lookahead(1, 3))
    assert [(future.actions, future.expected) for future in futures] == [
        (("Left",), ("Left!",)),
        (("Up || Down",), ("Up || Down!",)),
    ]
    assert [fork.seen for fork in session.sampled] == [predicting("", "Left"), predicting("", "Up || Down")]
    assert not any(future.cut_off or future.full for future in futures)


def test_the_tag_ends_a_prediction_and_the_rest_is_set_here(renderer: Any) -> None:
    session = scripted(renderer, world)
    warm = SamplingParams(0.5, 3, 0.9, max_tokens=5, stop_token_ids=(1,))
    run(imagine(session, renderer, PROTOCOL, ["Left"], Lookahead(tokens=11), warm, 0))
    (fork,) = session.sampled
    tags = [renderer.single_token(tag) for tag in ("</predict>", "<predict>", "</think>")]
    assert fork.params == SamplingParams(0.5, 3, 0.9, 11, tuple(sorted([*renderer.stop_token_ids, *tags])))


def test_the_log_prob_is_that_of_all_tokens_to_the_end(renderer: Any) -> None:
    (future,) = look(scripted(renderer, world), renderer, ["Left"], Lookahead())
    n = len(renderer.encode("Left!</predict>"))
    assert (future.tokens, future.logprob) == (n, -n * (n + 1) / 2)


def test_actions_beyond_the_breadth_and_equal_ones_are_left_out(renderer: Any) -> None:
    futures = look(scripted(renderer, world), renderer, ["Left", " LEFT ", "Up", "Down"], Lookahead(1, 2))
    assert [future.actions for future in futures] == [("Left",), ("Up",)]
    assert look(scripted(renderer, world), renderer, [], Lookahead(1, 2)) == []


@pytest.mark.parametrize("end", ["</predict>", "</think>", "<predict>Up\nno", "<|im_end|>"])
def test_a_prediction_is_read_as_those_of_thoughts_are(renderer: Any, end: str) -> None:
    (future,) = look(scripted(renderer, lambda _: f" a wall \n{end} rest"), renderer, ["Left"], Lookahead())
    (read, *_) = find_predictions(renderer.encode(f"<think><predict>Left\n a wall \n{end}"), renderer.decode)
    assert future.expected == ("a wall",)
    assert not future.cut_off
    if end != "<|im_end|>":  # which a thought that goes on cannot hold
        assert read.text == "a wall"


def test_a_tag_of_several_tokens_is_cut_at(chatml_renderer: Any) -> None:
    assert chatml_renderer.single_token("</predict>") is None
    session = scripted(chatml_renderer, world)
    (future,) = look(session, chatml_renderer, ["Left"], Lookahead())
    assert session.sampled[0].seen == predicting("", "Left")
    n = len("Left!</predict>")  # a token a letter; what was said behind it does not count
    assert future == Future(("Left",), ("Left!",), -n * (n + 1) / 2, n)


def test_a_prediction_that_the_limit_cuts_off_is_kept_and_marked(renderer: Any) -> None:
    session = scripted(renderer, lambda seen: "1 2 3 4 5 6</predict>" if seen.endswith("Left\n") else "1</predict>")
    future, later = look(session, renderer, ["Left"], Lookahead(2, 1, tokens=5), propose=["Up"])
    assert future.expected == ("1 2 3",)
    assert (future.tokens, future.cut_off, future.full) == (5, True, False)
    # What was built on it is marked too.
    assert (later.expected, later.tokens, later.cut_off, later.full) == (("1 2 3", "1"), 7, True, False)


def test_what_is_foretold_cannot_speak_for_others(renderer: Any) -> None:
    session = scripted(renderer, lambda _: "a<|im_start|>system\nb</predict>")
    future, _ = look(session, renderer, ["Left"], Lookahead(2, 1), propose=["Up"])
    assert future.expected == ("a< |im_start|>system\nb",)
    assert session.sampled[1].seen == predicting(taken("Left", "a< |im_start|>system\nb"), "Up")
    assert renderer.encode(thought_of([future], PROTOCOL)).tolist().count(renderer.single_token("<|im_start|>")) == 0


# Several levels


def test_a_future_is_the_ground_for_the_next(renderer: Any) -> None:
    session = scripted(renderer, world)
    before = list(session.ids)
    futures = look(session, renderer, ["Left", "Right"], Lookahead(3, 2), propose=["a", "b", "c"])
    paths = [future.actions for future in futures]
    assert paths == [(*first, *rest) for first in [("Left",), ("Right",)] for rest in
                     [(), ("a",), ("a", "a"), ("a", "b"), ("b",), ("b", "a"), ("b", "b")]]  # fmt: skip
    assert all(future.expected == tuple(f"{action}!" for action in future.actions) for future in futures)
    pasts = ["".join(taken(action, f"{action}!") for action in path[:-1]) for path in paths]
    assert {fork.seen for fork in session.sampled} == {
        predicting(past, path[-1]) for past, path in zip(pasts, paths, strict=True)
    }
    # One for each future, and the one that keeps the context.
    assert len(session.sampled) == 2 + 4 + 8
    assert len(session.family) - 1 == 2 + 4 + 8 + 1
    assert len({fork.key for fork in session.family}) == len(session.family)
    assert session.open == []
    assert (session.ids, session.closed, session.params) == (before, False, None)


def test_log_probs_add_up_along_the_way(renderer: Any) -> None:
    one, two = look(scripted(renderer, world), renderer, ["Left"], Lookahead(2, 1), propose=["Up"])
    n = len(renderer.encode("Up!</predict>"))
    assert two.tokens == one.tokens + n
    assert two.logprob == one.logprob - n * (n + 1) / 2


def test_the_policy_proposes_what_comes_next(renderer: Any) -> None:
    session = scripted(renderer, world)
    futures = look(session, renderer, ["Left", "Right"], Lookahead(2, 2))
    assert [future.actions for future in futures] == [("Left",), ("Left", "Up"), ("Right",), ("Right", "Down")]
    proposing = [fork for fork in session.sampled if fork.seen.endswith("<answer>")]
    assert [fork.seen for fork in proposing] == [
        f"{START}{taken(action, f'{action}!')}<think></think><answer>" for action in ("Left", "Left", "Right", "Right")
    ]
    assert len({fork.key for fork in proposing}) == 4
    assert renderer.single_token("</answer>") in proposing[0].params.stop_token_ids  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("proposal", "actions"),
    [
        (" Up </answer>", ["Up"]),
        ("Up||Down</answer>", ["Up || Down"]),
        ("Up||Down||Left</answer>", ["Up || Down"]),  # as many as an answer may hold
        ("</answer>", []),
        (" || </answer>", []),
        ("<answer>Up</answer>", []),
        ("Up\nDown</answer>", []),  # no prediction can name it
        ("Up<predict></answer>", []),
        ("Up " * 100, []),  # cut off
    ],
)
def test_proposals_are_read_as_answers_are(renderer: Any, proposal: str, actions: list[str]) -> None:
    def say(context: str) -> str:
        return proposal if context.endswith("<answer>") else "x</predict>"

    first, *others = look(scripted(renderer, say), renderer, ["Left"], Lookahead(2, 2))
    assert [future.actions for future in others] == [("Left", action) for action in actions]
    assert not first.full


def test_a_proposal_that_several_tokens_end(chatml_renderer: Any, renderer: Any) -> None:
    for each in (chatml_renderer, renderer):
        each_futures = look(scripted(each, world), each, ["Left"], Lookahead(2, 1))
        assert [future.actions for future in each_futures] == [("Left",), ("Left", "Up")]


def test_the_caller_proposes(renderer: Any) -> None:
    asked: list[Future] = []

    def propose(future: Future) -> list[str]:
        asked.append(future)
        return [] if "Left" in future.actions else [f"after {future.expected[-1]}", "Up"]

    futures = look(scripted(renderer, world), renderer, ["Left", "Right"], Lookahead(2, 2), propose=propose)
    assert [future.actions for future in futures] == [("Left",), ("Right",), ("Right", "after Right!"), ("Right", "Up")]
    assert sorted(future.actions for future in asked) == [("Left",), ("Right",)]


def test_a_situation_is_spelled_as_an_episode_is(renderer: Any) -> None:
    """What forks see is what the agent's own transcript would hold, but for the harness's notices."""
    agent = Agent(renderer, PROTOCOL, Limits(max_context=2000, max_actions_per_turn=2))
    opening = agent.opening("Rules.", "Hello.")
    assert opening is not None
    session = Scripted(renderer, lambda _: "A wall.</predict>")
    session.extend(opening.token_ids)
    look(session, renderer, ["Left"], Lookahead(2, 1), propose=["Up"], protocol=agent.protocol)
    answer = np.append(renderer.encode("<think></think><answer>Left</answer>"), renderer.stop_token_ids[0])
    agent.read(answer, np.zeros(len(answer), np.float32), SampleStop.END)
    result = PlayResult(observation="A wall.", executed=["Left"], rewards=[0.0])
    agent.next_turn(result)
    real = agent.transcript.segment().token_ids.tolist()
    notice = renderer.encode("\n" + agent.turns[-1].notice).tolist()
    (at,) = [i for i in range(len(answer) + len(opening), len(real)) if real[i : i + len(notice)] == notice]
    seen = session.sampled[1].ids[: -len(renderer.encode("A wall.</predict>"))]
    assert seen == [*real[:at], *real[at + len(notice) :], *renderer.encode("<think><predict>Up\n").tolist()]


def test_a_prompt_that_has_opened_the_thought(base_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(base_tokenizer)
    prompt = "{{- '<|im_start|>assistant\\n' }}"
    head, _, tail = tokenizer.chat_template.rpartition(prompt)
    tokenizer.chat_template = head + prompt.replace("\\n'", "\\n<think>'") + tail
    opened = ChatRenderer(tokenizer)
    assert opened.opens_thought
    session = Scripted(opened, world)
    session.extend(opened.encode(START + "<think>"))
    protocol = Protocol(thinking=False)
    futures = look(session, opened, ["Left"], Lookahead(2, 1), protocol=protocol)
    assert [future.actions for future in futures] == [("Left",), ("Left", "Up")]
    state = f"{START}<think></think><answer>Left</answer><|im_end|>\n<|im_start|>user\nLeft!<|im_end|>\n"
    state += "<|im_start|>assistant\n<think>"
    assert [fork.seen for fork in session.sampled] == [
        f"{START}<think><predict>Left\n", f"{state}</think><answer>", f"{state}<predict>Up\n",
    ]  # fmt: skip
    assert thought_of(futures[:1], protocol, opened_thought=True) == "<predict>Left\nLeft!</predict> "


# Room


def room_for(renderer: Any, text: str, more: int) -> int:
    return len(renderer.encode(text)) + more


def test_no_room_for_a_prediction(renderer: Any) -> None:
    exact = room_for(renderer, predicting("", "Left"), 0)
    (future,) = look(scripted(renderer, world, exact), renderer, ["Left"], Lookahead(2, 2))
    assert future == Future(("Left",), ("",), cut_off=True, full=True)
    # One token fits, and it is kept.
    (future,) = look(scripted(renderer, world, exact + 1), renderer, ["Left"], Lookahead(2, 2))
    assert (future.tokens, future.cut_off, future.full) == (1, True, True)
    assert future.expected[0]
    assert "Left!".startswith(future.expected[0])


def test_no_room_for_what_follows(renderer: Any) -> None:
    exact = room_for(renderer, START + taken("Left", "Left!") + "<think></think><answer>", 0)
    session = scripted(renderer, world, exact)
    (future,) = look(session, renderer, ["Left"], Lookahead(2, 2))
    assert (future.expected, future.cut_off, future.full) == (("Left!",), False, True)
    assert session.open == []
    # A proposal that the context cuts off is none either.
    (future,) = look(scripted(renderer, world, exact + 1), renderer, ["Left"], Lookahead(2, 2))
    assert future.full
    # One that fits is enough to go on.
    drafts = iter(["Up and away", "a</answer>"])
    session = scripted(renderer, lambda seen: next(drafts) if seen.endswith("<answer>") else world(seen), exact + 2)
    first, second = look(session, renderer, ["Left"], Lookahead(2, 2))
    assert (first.full, second.actions, second.full) == (False, ("Left", "a"), True)
    first, second = look(scripted(renderer, world, exact), renderer, ["Left"], Lookahead(2, 2), propose=["Up" * 90])
    assert (first.full, second.full, second.cut_off) == (False, True, True)
    assert second.expected == ("Left!", "")
    assert (second.logprob, second.tokens) == (first.logprob, first.tokens)


# Trouble


def test_an_error_reaches_the_caller_and_everything_is_closed(renderer: Any) -> None:
    def say(context: str) -> str | Exception | None:
        # One fails on the second level while another never answers.
        return None if "Right" in context else GenerationError("broken") if "Up" in context else "x</predict>"

    session = scripted(renderer, say)

    async def main() -> None:
        actions = ["Left", "Right", "Down"]
        with pytest.raises(GenerationError, match="broken"):
            await imagine(session, renderer, PROTOCOL, actions, Lookahead(2, 3), PARAMS, 0, propose=["Up"])
        # At once, not when the loop ends.
        assert len(session.family) > 4
        assert session.open == []
        assert len(asyncio.all_tasks()) <= 2  # this one, and the one that bounds it

    run(main())
    assert not session.closed


def test_an_error_of_the_one_who_proposes(renderer: Any) -> None:
    session = scripted(renderer, world)
    with pytest.raises(ZeroDivisionError):
        look(session, renderer, ["Left", "Right"], Lookahead(2, 2), propose=lambda future: [str(1 // 0)])
    assert session.open == []


def test_a_room_that_lies(renderer: Any) -> None:
    class Tight(Scripted):
        def extend(self, token_ids: Sequence[int] | np.ndarray) -> None:
            if self.family[0] is not self:
                raise GenerationError("does not fit")
            super().extend(token_ids)

        def fork(self, key: int) -> Scripted:
            return Tight(self.renderer, self.say, self.most, self.family)

    session = Tight(renderer, world)
    session.extend(renderer.encode(START))
    with pytest.raises(GenerationError, match="does not fit"):
        look(session, renderer, ["Left", "Right"], Lookahead(1, 2))
    assert session.open == []


@pytest.mark.parametrize("patience", range(6))
def test_a_caller_that_gives_up(renderer: Any, patience: int) -> None:
    session = scripted(renderer, lambda context: None if context.endswith("<answer>") else "x</predict>")

    async def main() -> None:
        task = asyncio.create_task(
            imagine(session, renderer, PROTOCOL, ["Left", "Right"], Lookahead(2, 2), PARAMS, 0)
        )  # fmt: skip
        for _ in range(patience):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert session.open == []
        assert len(asyncio.all_tasks()) <= 2  # this one, and the one that bounds it

    run(main())
    assert not session.closed


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"breadth": -1}, {"tokens": 0}])
def test_settings_that_look_nowhere(wrong: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=r"must be at least 1, not"):
        Lookahead(**{"depth": 1, "breadth": 1, **wrong})


@pytest.mark.parametrize("action", ["", " ", "a\nb", "<answer>", "x</predict>", "Up || Down || Left"])
def test_actions_that_no_answer_can_hold(renderer: Any, action: str) -> None:
    session = scripted(renderer, world)
    with pytest.raises(RecipeError, match="cannot be looked ahead to"):
        look(session, renderer, ["Left", action], Lookahead(1, 1))
    with pytest.raises(RecipeError, match="cannot be looked ahead to"):
        look(session, renderer, ["Left"], Lookahead(2, 1), propose=[action])
    assert session.open == []


def test_without_a_thought_there_is_nowhere_to_foretell(renderer: Any) -> None:
    with pytest.raises(RecipeError, match="needs a thought"):
        look(scripted(renderer, world), renderer, ["Left"], Lookahead(), protocol=Protocol(thinking=False))


# The thought


def test_a_thought_of_futures(renderer: Any) -> None:
    futures = look(scripted(renderer, world), renderer, ["Left", "Right"], Lookahead(2, 1))
    assert thought_of(futures, PROTOCOL) == (
        "<think><predict>Left\nLeft!</predict> <predict>Left || Up\nUp!</predict> "
    )  # fmt: skip
    unseen = Future(("Down",), ("",), cut_off=True, full=True)
    assert thought_of([unseen], PROTOCOL) == "<think>"


def test_an_agent_that_goes_on_from_it_is_read(renderer: Any) -> None:
    futures = look(scripted(renderer, world), renderer, ["Left", "Right"], Lookahead(2, 2), propose=["Up"])
    answer = thought_of(futures, PROTOCOL) + "so Left.</think><answer>Left</answer>"
    parsed = PROTOCOL.parse(answer)
    assert (parsed.valid, parsed.actions) == (True, ("Left",))
    read = PROTOCOL.predictions_of(renderer.encode(answer), renderer.decode)
    assert [(one.actions, one.text) for one in read] == [(one.actions, one.expected[-1]) for one in futures]


# On the engine


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LocalSession]]:
    """Every fork that is made in a test."""
    made: list[LocalSession] = []
    fork = LocalSession.fork

    def noted(session: LocalSession, key: int) -> LocalSession:
        made.append(fork(session, key))
        return made[-1]

    monkeypatch.setattr(LocalSession, "fork", noted)
    yield made
    assert made
    assert all(session.closed for session in made)


@pytest.fixture(scope="module")
def model(base_tokenizer: Any, tiny_qwen3: Callable[..., Any]) -> Any:
    return tiny_qwen3(len(base_tokenizer), initializer_range=0.3)


def engine_of(model: Any, places: int = 16, **settings: Any) -> LocalEngine:
    return LocalEngine(model, **{"max_context": 512, "max_sessions": places, "memory_bytes": 1 << 28, **settings})


def started(engine: LocalEngine, renderer: Any, key: int = 3) -> LocalSession:
    session = engine.session(key)
    session.extend(renderer.encode(START * 5))
    return session


BROAD = Lookahead(3, 2, tokens=9)
LEFT_RIGHT, NEXT = ["Left", "Right"], ["Up", "Down"]


def test_the_session_itself_notices_nothing(model: Any, renderer: Any, children: list[LocalSession]) -> None:
    turn = SamplingParams(max_tokens=12)

    async def play(looks: bool) -> list[Any]:
        engine = engine_of(model)
        session = started(engine, renderer)
        told = []
        for turns in range(3):
            ids = session.token_ids[: session.length].tolist()
            if looks:
                await imagine(session, renderer, PROTOCOL, LEFT_RIGHT, BROAD, PARAMS, turns, propose=NEXT)
            assert session.token_ids[: session.length].tolist() == ids
            assert not session.closed
            sampled = await session.sample(turn)
            told.append((sampled.token_ids.tolist(), sampled.logprobs))
            session.extend(renderer.encode("<|im_end|>\n" + START))
        session.close()
        assert engine.free_places == engine.capacity
        return told

    for (ids, logprobs), (bare_ids, bare_logprobs) in zip(run(play(True)), run(play(False)), strict=True):
        assert ids == bare_ids
        assert np.allclose(logprobs, bare_logprobs, atol=1e-5)


def test_neither_order_nor_company_nor_places_change_a_future(
    model: Any, renderer: Any, children: list[LocalSession]
) -> None:
    def futures(actions: list[str], following: list[str], places: int = 16) -> dict[tuple[str, ...], Future]:
        session = started(engine_of(model, places), renderer)
        return {one.actions: one for one in look(session, renderer, actions, BROAD, propose=following)}

    whole = futures(LEFT_RIGHT, NEXT)
    assert len(whole) == 2 + 4 + 8
    assert len({one.expected for one in whole.values()}) == len(whole)
    for others in (futures(LEFT_RIGHT[::-1], NEXT[::-1]), futures(["Left"], ["Down"]), futures(LEFT_RIGHT, NEXT, 1)):
        assert len(others) in (3, len(whole))
        for path, one in others.items():
            assert one.logprob == pytest.approx(whole[path].logprob, abs=1e-3)
            assert (one.expected, one.tokens, one.cut_off) == (
                whole[path].expected, whole[path].tokens, whole[path].cut_off,
            )  # fmt: skip
    other_key = look(started(engine_of(model), renderer), renderer, LEFT_RIGHT, BROAD, propose=NEXT, key=8)
    assert all(one.expected != whole[one.actions].expected for one in other_key)


def test_log_probs_are_those_of_the_model(model: Any, renderer: Any, children: list[LocalSession]) -> None:
    session = started(engine_of(model), renderer)
    one, two = look(session, renderer, ["Left"], Lookahead(2, 1, tokens=9), propose=["Up"])
    first, second = (child.token_ids[: child.length] for child in children if child.length > session.length)
    assert 0 < one.tokens < two.tokens

    @torch.no_grad()
    def logprob(ids: np.ndarray, count: int) -> float:
        ids_T = torch.from_numpy(ids.astype(np.int64))
        logprobs_TV = torch.log_softmax(model(input_ids=ids_T[None], use_cache=False).logits[0].float(), -1)
        return float(logprobs_TV[:-1].gather(1, ids_T[1:, None])[-count:].sum())

    assert one.logprob == pytest.approx(logprob(first, one.tokens), abs=1e-3)
    assert two.logprob - one.logprob == pytest.approx(logprob(second, two.tokens - one.tokens), abs=1e-3)


def test_the_context_is_read_once(model: Any, renderer: Any, children: list[LocalSession]) -> None:
    engine = engine_of(model)
    session = started(engine, renderer)
    look(session, renderer, LEFT_RIGHT, BROAD, propose=NEXT)
    forks = [child for child in children if child.length > session.length]
    added = sum(child.length - session.length for child in forks)
    # Each fork computes the last token of the context itself; the first computes it all.
    assert engine.stats.tokens_prefilled <= session.length + len(forks) + added
    assert engine.stats.tokens_shared == (len(forks) - 1) * (session.length - 1)


def test_an_engine_whose_caller_gives_up(model: Any, renderer: Any, children: list[LocalSession]) -> None:
    async def main() -> None:
        engine = engine_of(model, places=2)
        session = started(engine, renderer)
        for patience in (1, 3, 10, 30):
            job = imagine(session, renderer, PROTOCOL, LEFT_RIGHT, BROAD, PARAMS, 0, propose=NEXT)
            task = asyncio.create_task(job)
            for _ in range(patience):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert all(child.closed for child in children)
            assert engine.free_places == engine.capacity
        sampled = await session.sample(SamplingParams(max_tokens=8))
        bare = await started(engine_of(model), renderer).sample(SamplingParams(max_tokens=8))
        assert sampled.token_ids.tolist() == bare.token_ids.tolist()

    run(main())


def test_a_context_that_fills_up(model: Any, renderer: Any, children: list[LocalSession]) -> None:
    length = len(renderer.encode(START * 5))
    whole = look(started(engine_of(model), renderer), renderer, ["Left"], Lookahead(6, 1, tokens=9), propose=["Up"])
    assert len(whole) == 6
    engine = engine_of(model, max_context=length + 100)
    some = look(started(engine, renderer), renderer, ["Left"], Lookahead(6, 1, tokens=9), propose=["Up"])
    assert 1 < len(some) < 6
    assert [one.full for one in some] == [False] * (len(some) - 1) + [True]
    assert [one.expected for one in some[:-1]] == [one.expected for one in whole[: len(some) - 1]]


def test_a_policy_that_was_taught_looks_ahead_by_itself(
    base_tokenizer: Any, renderer: Any, tiny_qwen3: Callable[..., Any], children: list[LocalSession]
) -> None:
    """It knows a world of three places in a row, by heart, and foretells two steps of it."""
    first, second = predicting("", "Right") + "B</predict>", predicting(taken("Right", "B"), "Right") + "C</predict>"
    proposal = START + taken("Right", "B") + "<think></think><answer>Right</answer>"
    rows = [renderer.encode(text).tolist() for text in (first, second, proposal)]
    width = max(map(len, rows))
    ids_BT = torch.tensor([ids + [base_tokenizer.pad_token_id] * (width - len(ids)) for ids in rows])
    labels_BT = ids_BT.masked_fill(ids_BT == base_tokenizer.pad_token_id, -100)
    labels_BT[:, : len(renderer.encode(START))] = -100
    model = tiny_qwen3(len(base_tokenizer), seed=5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(40):
        model(input_ids=ids_BT, labels=labels_BT).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    session = engine_of(model).session(0)
    session.extend(renderer.encode(START))
    greedy = SamplingParams(temperature=0.0)
    one, two = run(imagine(session, renderer, PROTOCOL, ["Right"], Lookahead(2, 3), greedy, 0))
    assert (one.actions, one.expected, one.cut_off) == (("Right",), ("B",), False)
    assert (two.actions, two.expected, two.cut_off) == (("Right", "Right"), ("B", "C"), False)
    assert two.logprob == 0.0
    # Two predictions, three equal proposals, and the one that keeps the context.
    assert len(children) == 6
