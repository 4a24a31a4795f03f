"""Bandit: names, pay, success."""

import pytest

from rehearsal.environments import SPLITS, make
from rehearsal.environments.bandit import PAIRS, Bandit
from rehearsal.errors import RecipeError


def test_names_are_enough_and_never_shared():
    assert len(PAIRS["train"]) >= 12
    assert len(PAIRS["test"]) >= 8
    names = [name.casefold() for split in SPLITS for pair in PAIRS[split] for name in pair]
    assert len(names) == len(set(names))
    assert all(name.isalpha() for name in names)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("reversed", [False, True])
def test_pay_follows_the_names(split, reversed):
    env = Bandit(reversed=reversed)
    steady_names = {steady for steady, _ in PAIRS[split]}
    risky_pay, shown_first = [], 0
    for seed in range(600):
        observation, _ = env.reset(seed=seed, options={"split": split})
        first, second = env.legal_actions()
        assert observation == f"arms {first} {second}"
        steady = first if first in steady_names else second
        risky = second if steady == first else first
        shown_first += risky == first
        if reversed:
            steady, risky = risky, steady
        _, reward, terminated, _, info = env.step(risky if seed % 2 else steady)
        assert terminated
        assert info["success"] == bool(seed % 2)
        if seed % 2:
            risky_pay.append(reward)
        else:
            assert reward == 0.15
    assert set(risky_pay) == {0.0, 1.0}
    assert abs(sum(risky_pay) / len(risky_pay) - 0.25) < 0.09
    assert 240 < shown_first < 360


def test_the_instructions_do_not_give_the_variant_away():
    assert Bandit().instructions == Bandit(reversed=True).instructions


def test_success_is_the_better_arm_even_where_that_is_the_steady_one():
    env = Bandit(low=0.5)
    env.reset(seed=0)
    facts = env.describe()
    assert facts["best"] != facts["risky"]
    assert env.oracle() == [facts["best"]]
    _, reward, _, _, info = env.step(facts["best"])
    assert (reward, info["success"]) == (0.5, True)


def test_arms_of_equal_expectation_are_refused():
    with pytest.raises(RecipeError, match="neither is better"):
        make("bandit", low=0.25)
    with pytest.raises(RecipeError, match="chance"):
        make("bandit", chance=2)


def test_held_out_pairs_are_new_and_their_names_are_not():
    env = Bandit(held_out="pairs")
    steady_names, risky_names = zip(*PAIRS["train"], strict=True)
    met: dict[str, set[frozenset[str]]] = {}
    for split in SPLITS:
        met[split] = set()
        for seed in range(1500):
            env.reset(seed=seed, options={"split": split})
            facts = env.describe()
            assert facts["best"] in risky_names
            assert sum(arm in steady_names for arm in facts["arms"]) == 1
            met[split].add(frozenset(facts["arms"]))
    assert sum(len(pairs) for pairs in met.values()) == len(steady_names) * len(risky_names)
    assert len(frozenset.union(*map(frozenset, met.values()))) == len(steady_names) * len(risky_names)
    # Every name was met in training, so that it is the pairs alone that are new.
    assert frozenset.union(*met["train"]) == set(steady_names) | set(risky_names)


def test_what_is_held_out_must_be_known():
    with pytest.raises(RecipeError, match="held_out"):
        make("bandit", held_out="words")
