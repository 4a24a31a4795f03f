"""Help desk: companies and their requirements, episodes, splits, and the player that remembers."""

import itertools
import re
import time
import warnings
from collections import defaultdict

import gymnasium as gym
import numpy as np
import pytest

from rehearsal.environments import SPLITS, check_env, make, names
from rehearsal.environments import helpdesk_words as words
from rehearsal.environments.helpdesk import MAX_COMPANIES, Helpdesk, company_names, company_split
from rehearsal.environments.helpdesk_memory import RememberingOracle
from rehearsal.environments.helpdesk_words import DAYS, FACTS, GATHER, GIVE, LEAVE, MATTERS, REACH
from rehearsal.environments.splits import content_split
from rehearsal.errors import EnvironmentFault, RecipeError

VARIANTS = [
    {},
    {"revision": 2, "changed": 0.5, "world": 7},
    {"max_facts": 1, "dependent": 0.0},
    {"max_facts": 4, "dependent": 1.0, "fact_cost": 0.0},
    {"first": 100, "companies": 30},
]


def play(env, act, seed, **options):
    """The info, total reward and texts of an episode; ``act`` takes an observation."""
    observation, info = env.reset(seed=seed, options=options)
    texts, total, over = [observation], 0.0, False
    while not over:
        observation, reward, terminated, truncated, info = env.step(act(observation))
        over = terminated or truncated
        total += reward
        texts.append(observation)
    return info, total, texts


def prepared_with(env, gather):
    """A player that gathers the facts that ``gather()`` says, reaches the company and gives what it has."""
    plan = []

    def act(observation):
        if env.steps_left == env.max_steps:
            facts, channel = list(gather()), env.describe()["channel"]
            plan[:] = [GATHER[fact] for fact in facts] + [REACH[channel]] + [GIVE[fact] for fact in facts]
        return plan.pop(0) if plan else LEAVE[env.describe()["channel"]]

    return act


def oracle(env):
    return lambda observation: env.oracle()[0]


# The contract


@pytest.mark.parametrize("params", VARIANTS)
def test_the_checker_finds_nothing(params):
    report = check_env(make("helpdesk", **params))
    assert report.ok, str(report)
    assert not report.skipped
    assert {"splits", "the oracle", "the end of an episode"} <= set(report.checked)


@pytest.mark.parametrize("params", VARIANTS)
def test_the_oracle_always_succeeds(params):
    env = make("helpdesk", **params)
    for seed in range(300):
        env.reset(seed=seed)
        wanted, plan = len(env.wanted), env.oracle()
        assert len(plan) == 2 * wanted + 1 < env.max_turns
        assert env.optimal_success() == 1.0
        info, total, _ = play(env, oracle(env), seed)
        assert info["success"]
        assert total == pytest.approx(1 - env.fact_cost * wanted)
        assert env.oracle() == []
        assert env.optimal_success() == 1.0


def test_it_is_known_by_name():
    assert "helpdesk" in names()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make("rehearsal/Helpdesk-v0")
        observation, _ = env.reset(seed=3)
        assert env.observation_space.contains(observation)
        env.step(env.unwrapped.oracle()[0])


def test_a_seed_fixes_every_word():
    def transcript(env, seed):
        chance = np.random.default_rng(seed)
        observed = [env.reset(seed=seed)]
        while env.steps_left:
            legal = env.legal_actions()
            observed.append(env.step(legal[int(chance.integers(len(legal)))]))
        return observed

    used = make("helpdesk")
    for seed in range(50):
        assert transcript(used, seed) == transcript(make("helpdesk"), seed)
    assert len({used.reset()[1]["task"] for _ in range(30)}) > 25


def test_chance_changes_the_words_of_the_company_and_not_the_task():
    env = make("helpdesk")
    for seed in range(10):
        firsts, told = set(), set()
        for chance in range(20):
            first, _ = env.reset(seed=seed, options={"split": "test", "chance": chance})
            firsts.add(first)
            told.add(env.step(REACH[env.describe()["channel"]])[0])
        assert len(firsts) == 1
        assert len(told) > 3


def test_steps_outside_of_an_episode_ask_for_a_reset():
    env = make("helpdesk")
    for call in (env.oracle, env.describe, env.optimal_success, env.legal_actions, lambda: env.wanted):
        with pytest.raises(gym.error.ResetNeeded, match="reset"):
            call()
    play(env, oracle(env), 0)
    with pytest.raises(gym.error.ResetNeeded):
        env.step("call")


def test_resets_are_cheap():
    env = make("helpdesk", revision=5)
    assert env.fast
    best = float("inf")
    for _ in range(5):  # the best of a few, because other programs may have the processor
        start = time.thread_time()
        for seed in range(50):
            env.reset(seed=seed)
        best = min(best, (time.thread_time() - start) / 50 * 1000)
    assert best < 5.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"companies": 0}, "companies"),
        ({"companies": 100, "first": 1950}, "go beyond the 2000"),
        ({"first": -1}, "first"),
        ({"world": 0.5}, "world"),
        ({"revision": True}, "revision"),
        ({"changed": 1.5}, "changed"),
        ({"dependent": "all"}, "dependent"),
        ({"max_facts": 5}, "max_facts"),
        ({"max_facts": 1}, "dependent=0"),
        ({"fact_cost": 0.5}, "fact_cost"),
        ({"company": 3}, "did you mean companies"),
    ],
)
def test_wrong_parameters_get_one_clear_sentence(params, message):
    with pytest.raises(RecipeError, match=message) as caught:
        make("helpdesk", **params)
    assert "\n" not in str(caught.value)


# Companies


def test_names_are_distinct_and_keep_their_split_in_every_world():
    for world in (0, 1, 12345):
        given = company_names(world)
        assert len(given) == len(set(given)) == MAX_COMPANIES
        assert all(name.isalpha() for name in given)
        assert all(content_split(name) == company_split(index) for index, name in enumerate(given))
    assert company_names(0) != company_names(1)
    assert not set(company_names(0)) & {*MATTERS, *DAYS, *FACTS, *words.CUSTOMERS}


def test_thousands_of_tasks_never_cross_splits():
    env = make("helpdesk")
    tasks, met = defaultdict(set), defaultdict(set)
    for split, episodes in (("train", 4000), ("validation", 1000), ("test", 1000)):
        for seed in range(episodes):
            _, info = env.reset(seed=seed, options={"split": split})
            assert info["split"] == split
            assert info["company"] == env.company(info["company_index"]).name
            tasks[split].add(info["task"])
            met[split].add(info["company"])
    for one, other in itertools.combinations(SPLITS, 2):
        assert not tasks[one] & tasks[other]
        assert not met[one] & met[other]
    assert {split: len(met[split]) for split in SPLITS} == {"train": 400, "validation": 50, "test": 50}


def test_a_window_restricts_the_companies_and_changes_nothing_about_them():
    env, whole = make("helpdesk", first=40, companies=20), make("helpdesk")
    met = {env.reset(seed=seed)[1]["company_index"] for seed in range(400)}
    assert met == {index for index in range(40, 60) if company_split(index) == "train"}
    assert all(env.company(index) == whole.company(index) for index in range(500))
    with pytest.raises(EnvironmentFault, match="0 to 4 belongs to the test split"):
        make("helpdesk", companies=5).reset(options={"split": "test"})


def test_a_company_can_be_asked_for():
    env = make("helpdesk", companies=10)
    for index in (3, 8, 9, 1777):
        infos = [env.reset(seed=seed, options={"company": index})[1] for seed in range(20)]
        assert {info["company"] for info in infos} == {env.company(index).name}
        assert {info["split"] for info in infos} == {company_split(index)}
        assert len({info["task"] for info in infos}) > 15
    env.reset(options={"company": 9, "split": "test"})
    with pytest.raises(RecipeError, match="belongs to the test split and not to train"):
        env.reset(options={"company": 9, "split": "train"})
    with pytest.raises(gym.error.ResetNeeded):
        env.step("call")
    with pytest.raises(RecipeError, match="There is no split"):
        env.reset(options={"company": 9, "split": "tests"})
    with pytest.raises(RecipeError, match="company must be a whole number"):
        env.reset(options={"company": env.company(3).name})
    # A company that was asked for once is not kept for the episodes after it.
    assert len({env.reset(seed=seed)[1]["company"] for seed in range(50)}) == 8


@pytest.mark.parametrize("max_facts", [1, 2, 3, 4])
def test_requirements_have_one_fact_to_the_most(max_facts):
    dependent = 0.4 if max_facts > 1 else 0.0
    env = make("helpdesk", max_facts=max_facts, dependent=dependent)
    requirements = [env.company(index).requirement for index in range(MAX_COMPANIES)]
    sizes = {len(one.wanted(matter, day)) for one in requirements for matter in MATTERS for day in DAYS}
    assert sizes == set(range(1, max_facts + 1))
    assert {fact for one in requirements for fact in one.always} == set(FACTS)
    depending = [one for one in requirements if one.extra]
    assert abs(len(depending) / MAX_COMPANIES - dependent) < 0.04
    assert all(one.extra not in one.always and len(set(one.when)) == 2 for one in depending)
    assert all(set(one.when) <= set(MATTERS) or set(one.when) <= set(DAYS) for one in depending)


def test_what_is_wanted_follows_the_matter_or_the_day():
    env = make("helpdesk", dependent=1.0)
    requirement = env.company(0).requirement
    for seed in range(60):
        env.reset(seed=seed, options={"company": 0})
        facts = env.describe()
        applies = bool({facts["matter"], facts["day"]} & set(requirement.when))
        assert (requirement.extra in env.wanted) == applies
        told, *_ = env.step(REACH[facts["channel"]])
        assert (requirement.when[0] in told) == (requirement.when[1] in told) == applies


@pytest.mark.parametrize("changed", [0.0, 0.3, 1.0])
def test_a_revision_changes_about_the_share_asked_for(changed):
    before, once, twice = (make("helpdesk", revision=revision, changed=changed) for revision in range(3))
    for old, new in ((before, once), (once, twice)):
        pairs = [(old.company(index), new.company(index)) for index in range(MAX_COMPANIES)]
        assert all((a.name, a.channel) == (b.name, b.channel) for a, b in pairs)
        differ = [set(a.requirement.always) != set(b.requirement.always) for a, b in pairs]
        assert abs(sum(differ) / MAX_COMPANIES - changed) < 0.04
        # What did not change is the same in all of it.
        assert differ == [a.requirement != b.requirement for a, b in pairs]
    assert [before.reset(seed=seed) for seed in range(50)] == [twice.reset(seed=seed) for seed in range(50)]


def test_the_first_observation_does_not_tell_what_is_wanted():
    env = make("helpdesk", dependent=0.0)
    for seed in range(5):
        by_text = defaultdict(set)
        for index in range(500):
            observation, info = env.reset(seed=seed, options={"company": index})
            by_text[observation.replace(info["company"], "X")].add(env.wanted)
            assert not any(fact in observation.casefold() for fact in FACTS)
        # One text a channel, and under each of them every set of facts that there is, or nearly so.
        assert len(by_text) == 2
        assert all(len(wanted) >= 20 for wanted in by_text.values())


# Episodes


def test_an_episode_that_fails_tells_what_was_wanted_before_it_ends():
    env = make("helpdesk")
    for seed in range(100):
        env.reset(seed=seed)
        wanted, channel = env.wanted, env.describe()["channel"]
        assert env.describe()["told"] == []
        told, reward, terminated, _, info = env.step(REACH[channel])
        assert (reward, terminated, info["success"]) == (0.0, False, False)
        assert {fact for fact in FACTS if re.search(rf"\b{fact}\b", told)} == set(wanted)
        assert env.describe()["told"] == list(wanted)
        assert env.optimal_success() == 0.0 and env.oracle() == []
        assert env.legal_actions() == [*GIVE.values(), LEAVE[channel]]
        last = LEAVE[channel] if seed % 2 else GIVE[wanted[0]]
        _, reward, terminated, _, info = env.step(last)
        assert (reward, terminated, info["success"]) == (0.0, True, False)


def test_no_more_facts_than_there_is_time_for():
    env = make("helpdesk")
    env.reset(seed=0)
    for place, fact in enumerate(FACTS):
        observation, _, _, _, info = env.step(GATHER[fact])
        assert info["effective"] == (place < 3)
        ready = f"Ready: {', '.join(FACTS[: min(place, 2) + 1])}."
        assert observation == f"{words.FOUND if place < 3 else words.FULL} {ready}"
    assert env.describe()["ready"] == list(FACTS[:3])
    observation, _, _, _, info = env.step(GATHER["card"])
    assert observation == f"{words.TWICE} Ready: account, card, document."
    assert not info["effective"]


def test_needless_facts_cost_what_they_cost():
    env = make("helpdesk", fact_cost=0.1)
    seed = next(seed for seed in range(100) if env.reset(seed=seed) and len(env.wanted) == 1)
    env.reset(seed=seed)
    wanted, channel = env.wanted[0], env.describe()["channel"]
    other = next(fact for fact in FACTS if fact != wanted)
    plan = [GATHER[other], GATHER[wanted], REACH[channel], GIVE[other], GIVE[wanted]]
    results = [env.step(action) for action in plan]
    assert results[3][0] == words.NEEDLESS[channel] and not results[3][-1]["effective"]
    assert [result[1] for result in results] == [0, 0, 0, 0, pytest.approx(0.8)]
    assert results[-1][-1]["success"]


def test_the_wrong_way_to_reach_a_company_costs_an_action_and_no_more():
    env = make("helpdesk")
    for seed in range(40):
        env.reset(seed=seed)
        channel = env.describe()["channel"]
        wrong = next(action for way, action in REACH.items() if way != channel)
        observation, reward, terminated, _, info = env.step(wrong)
        assert (reward, terminated, info["effective"]) == (0.0, False, False)
        assert observation == f"{info['company']} has only a {words.CHANNEL_WORDS[channel]}."
        while env.steps_left:
            *_, info = env.step(env.oracle()[0])
        assert info["success"]


def test_an_episode_is_cut_after_its_steps():
    env = make("helpdesk")
    env.reset(seed=0)
    ends = [env.step(GATHER["pin"])[2:4] for _ in range(env.max_turns)]
    assert ends == [(False, False)] * 7 + [(False, True)]


def test_actions_are_read_leniently_and_refused_strictly():
    env = make("helpdesk")
    env.reset(seed=0)
    assert env.parse_action("ASK  card") == "look up card"
    assert env.parse_action(" look up pin ") == "ask pin"
    assert env.parse_action("ask name") is None
    with pytest.raises(ValueError, match="not a legal action"):
        env.step("give card")
    env.step(REACH[env.describe()["channel"]])
    assert env.parse_action("ask card") is None
    assert env.parse_action("Give Card") == "give card"


def test_texts_are_short():
    env = make("helpdesk")
    assert len(env.instructions.split()) < 100
    seen = set()
    for seed in range(600):
        _, _, texts = play(env, oracle(env), seed)
        assert len(texts[0].split()) < 20
        assert all(len(text.split()) < 30 for text in texts)
        sentences = [sentence for text in texts[1:] for sentence in text.split(". ")]
        assert all(len(sentence.split()) < 25 for sentence in sentences)
        seen |= {word for text in texts for word in re.findall(r"\w+", text)}
    assert len(seen - set(company_names(0))) < 180


def test_every_phrase_names_its_fact_and_no_other():
    for fact, phrases in words.PHRASES.items():
        assert len(set(phrases)) == len(phrases) == 4
        for phrase in phrases:
            assert [other for other in FACTS if re.search(rf"\b{other}\b", phrase)] == [fact]


# Players


def test_players_that_know_nothing_rarely_succeed():
    env = make("helpdesk")
    chance = np.random.default_rng(0)

    def rate(act):
        return np.mean([play(env, act, seed)[0]["success"] for seed in range(2000)])

    def at_random(observation):
        legal = env.legal_actions()
        return legal[int(chance.integers(len(legal)))]

    assert rate(prepared_with(env, tuple)) == 0.0
    assert rate(at_random) < 0.05
    some = rate(prepared_with(env, lambda: chance.permutation(FACTS)[:3].tolist()))
    assert 0.15 < some < 0.25
    wanted = [set(env.wanted) for seed in range(2000) if env.reset(seed=seed)]
    fixed = [np.mean([one <= set(facts) for one in wanted]) for facts in itertools.combinations(FACTS, 3)]
    assert max(fixed) < 0.26


def first_calls(env, player, indices, calls):
    """The share of companies that each of the first calls succeeded with."""
    won = [[play(env, player.act, 1000 * i + k, company=i)[0]["success"] for k in range(calls)] for i in indices]
    return np.mean(won, axis=0)


@pytest.mark.parametrize("split", SPLITS)
def test_who_remembers_needs_one_call_to_settle_most_matters_of_a_new_company(split):
    env = make("helpdesk")
    new = [index for index in range(500) if company_split(index) == split]
    rates = first_calls(env, RememberingOracle(), new, 8)
    assert rates[0] < 0.4  # some of the splits have 50 companies only
    calls = int(np.argmax(rates >= 0.8)) + 1
    assert calls == 2, "told once, it settles 80% of matters from the second call on"
    assert rates[-4:].mean() > 0.95
    # Where nothing depends on matter or day, being told once is enough for good.
    certain = first_calls(make("helpdesk", dependent=0.0), RememberingOracle(), new, 4)
    assert (certain[1:] == 1.0).all()


def test_who_remembers_learns_changed_requirements_again():
    player, indices = RememberingOracle(), range(150)
    first_calls(make("helpdesk"), player, indices, 8)
    rates = first_calls(make("helpdesk", revision=1, changed=0.5), player, indices, 8)
    assert rates[0] < 0.7
    assert rates[-4:].mean() > 0.95


def test_who_remembers_sees_texts_alone():
    env, player = make("helpdesk", dependent=1.0), RememberingOracle()
    episodes = [play(env, player.act, seed)[2] for seed in range(300)]
    # The texts alone, without an environment, teach another player the same.
    other = RememberingOracle()
    for *texts, _ in episodes:
        for text in texts:
            other.act(text)
    assert other.memory == player.memory
    conditions = 0
    for index in range(500):
        company = env.company(index)
        if company.name in player.memory:
            known, requirement = player.memory[company.name], company.requirement
            assert known.always == set(requirement.always)
            assert known.when in ({}, {value: {requirement.extra} for value in requirement.when})
            conditions += bool(known.when)
    assert conditions > 50
    with pytest.raises(ValueError, match="Nothing is left"):
        RememberingOracle().act("Good morning.")


def test_a_guess_must_be_facts():
    with pytest.raises(RecipeError, match="did you mean pin"):
        RememberingOracle(guess=["pins"])
    with pytest.raises(RecipeError, match="twice"):
        RememberingOracle(guess=["pin", "pin"])


def test_a_guess_beyond_what_can_be_gathered_is_given_up():
    env = make("helpdesk", max_facts=2)
    rates = first_calls(env, RememberingOracle(), range(100), 3)
    assert 0 < rates[0] < 0.5
    assert rates[1] > 0.8


def test_the_class_names_its_turns():
    assert Helpdesk.max_turns == make("helpdesk").max_turns == 8
    assert make("helpdesk", max_facts=4).max_turns == 10
