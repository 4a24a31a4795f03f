"""The memory of past situations: bounded, even over topics, and the same after a pause."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.agents.rehearse import Hindsight
from rehearsal.training.replay import Replay


def situation(topic: int, number: int = 0) -> Hindsight:
    return Hindsight(np.array([topic, number, 7], dtype=np.int32), 1, f"company {topic}", "helpdesk", False)


def names(drawn: list[Hindsight]) -> Counter[str]:
    return Counter(one.topic for one in drawn)


def test_topics_come_evenly_however_often_they_were_met() -> None:
    replay = Replay(100)
    replay.add([situation(0, number) for number in range(50)])
    replay.add([situation(topic) for topic in range(1, 5)])
    rng = np.random.default_rng(0)
    assert set(names(replay.draw(5, rng)).values()) == {1}
    # Only one of the others is left after a round, the rest come from the topic that has more.
    assert names(replay.draw(7, rng)) == {"company 0": 3, **{f"company {topic}": 1 for topic in range(1, 5)}}
    assert len(replay.draw(1000, rng)) == len(replay) == 8 + 4


def test_within_a_topic_the_newest_stay() -> None:
    replay = Replay(100, per_topic=3)
    replay.add([situation(0, number) for number in range(5)])
    replay.add([situation(0, 3)])
    rng = np.random.default_rng(0)
    assert sorted(int(one.token_ids[1]) for one in replay.draw(9, rng)) == [2, 3, 4]
    replay.add([situation(0, 9)])  # 3 was renewed, so 2 is the oldest
    assert sorted(int(one.token_ids[1]) for one in replay.draw(9, rng)) == [3, 4, 9]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=60), st.integers(1, 20), st.integers(1, 4))
def test_it_never_grows_beyond_its_size(met: list[tuple[int, int]], size: int, per_topic: int) -> None:
    replay = Replay(size, per_topic)
    for topic, number in met:
        replay.add([situation(topic, number)])
        assert len(replay) <= size
    drawn = replay.draw(100, np.random.default_rng(0))
    assert len(drawn) == len(replay)
    assert len({one.token_ids.tobytes() for one in drawn}) == len(drawn)
    assert max(names(drawn).values(), default=0) <= per_topic


def test_the_fullest_topic_gives_way() -> None:
    replay = Replay(6)
    replay.add([situation(0, number) for number in range(5)])
    replay.add([situation(1), situation(2), situation(3)])
    assert names(replay.draw(9, np.random.default_rng(0))) == {
        "company 0": 3,
        "company 1": 1,
        "company 2": 1,
        "company 3": 1,
    }


def test_it_goes_on_where_it_stopped() -> None:
    replay, again = Replay(20), Replay(20)
    replay.add([situation(topic, number) for topic in range(4) for number in range(topic + 1)])
    again.load_state_dict(replay.state_dict())
    one, two = (memory.draw(7, np.random.default_rng(1)) for memory in (replay, again))
    assert [first.token_ids.tolist() for first in one] == [second.token_ids.tolist() for second in two]
    assert (one[0].first, one[0].topic, one[0].environment) == (two[0].first, two[0].topic, two[0].environment)
    assert Replay(5).draw(3, np.random.default_rng(0)) == []
