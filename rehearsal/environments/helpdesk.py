"""Help desk: settle customers' matters with companies that say what they want only when it is too late to get it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from rehearsal.environments import helpdesk_words as words
from rehearsal.environments.base import SPLITS
from rehearsal.environments.episode import EpisodeEnv, real_number, whole_number
from rehearsal.environments.helpdesk_words import DAYS, FACTS, GATHER, GIVE, LEAVE, MATTERS, REACH
from rehearsal.environments.splits import content_split, split_option
from rehearsal.errors import EnvironmentFault, RecipeError

MAX_COMPANIES = 2000
"""Companies that a world has: as many as there are names for, in every split."""

_FEWER = (0.70, 0.25, 0.05)
"""Shares of companies that always want as many facts as there is room for, one fewer, and two fewer."""


@dataclass(frozen=True)
class Requirement:
    """What a company wants.

    Attributes:
        always: facts that it wants in any case, in no special order.
        when: two matters, or two days, for which it wants one fact more; empty where nothing depends on either.
        extra: that fact, or "".
    """

    always: tuple[str, ...]
    when: tuple[str, ...] = ()
    extra: str = ""

    def applies(self, matter: str, day: str) -> bool:
        """Whether the extra fact is wanted."""
        return matter in self.when or day in self.when

    def wanted(self, matter: str, day: str) -> tuple[str, ...]:
        """All facts that are wanted, in the order of ``FACTS``."""
        extra = {self.extra} if self.applies(matter, day) else set()
        return tuple(fact for fact in FACTS if fact in {*self.always, *extra})


@dataclass(frozen=True)
class Company:
    """A company of a world.

    Attributes:
        index: its place in the world, from 0.
        name: its name, one word, which belongs to the same split in every world.
        channel: "phone" or "form".
        requirement: what it wants.
    """

    index: int
    name: str
    channel: str
    requirement: Requirement

    @property
    def split(self) -> str:
        """The split that the company belongs to."""
        return company_split(self.index)


def company_split(index: int) -> str:
    """The split of a company: of ten that follow each other, eight train, one validates and one tests."""
    return {8: "validation", 9: "test"}.get(index % 10, "train")


@lru_cache(maxsize=64)
def company_names(world: int) -> tuple[str, ...]:
    """The names of all companies of a world, by index.

    A name may stand only where the split of the index is that of the name's hash, so that two worlds never have the
    same name in different splits either.
    """
    made = [head + tail for head in words.NAME_HEADS for tail in words.NAME_TAILS]
    stocks: dict[str, list[str]] = {split: [] for split in SPLITS}
    for place in np.random.default_rng([world, 0, 0, 1]).permutation(len(made)):
        stocks[content_split(made[place])].append(made[place])
    return tuple(stocks[company_split(index)].pop() for index in range(MAX_COMPANIES))


def _draw_requirement(rng: np.random.Generator, max_facts: int, dependent: float) -> Requirement:
    depends = bool(rng.random() < dependent)
    room = max_facts - depends
    count = max(1, room - int(rng.choice(len(_FEWER), p=_FEWER)))
    drawn = [FACTS[place] for place in rng.permutation(len(FACTS))[: count + depends]]
    if not depends:
        return Requirement(tuple(drawn))
    values = MATTERS if rng.random() < 0.5 else DAYS
    when = sorted(rng.permutation(len(values))[:2].tolist())
    return Requirement(tuple(drawn[:count]), tuple(values[place] for place in when), drawn[count])


class Helpdesk(EpisodeEnv):
    """Prepare for a company, reach it, and give it the facts that it wants.

    A customer has a matter with a company, which serves by phone or by web form. Five facts may be wanted: account
    number, card digits and a document are on file and are looked up; pin and callback number are asked from the
    customer. At most ``max_facts`` can be gathered. What a company wants (one fact to ``max_facts`` facts) is said, in
    varied words, only once it has been reached, and then no more can be gathered: the facts must all have been ready.
    Some companies want one fact more for two of the matters or on two of the days, and say so when it applies.

    An agent that lacks a wanted fact hears what is wanted, has one action left, and has failed whatever it is. The
    failure comes with that action and not with the call, because an agent is never shown the observation that ends an
    episode: what was wanted has to be among the words that it sees and can learn from.

    The reward is 1 for a settled matter, less ``fact_cost`` for each fact that was gathered, and 0 for any other end
    and any other step. The cost is taken from what a success pays: charged where it arises, it would rank the failures
    of a group by how little was prepared, and teach an agent that never succeeds to prepare nothing.

    A company is fixed by ``world`` and its index: name, channel, and what it wants. Of ten companies that follow each
    other the first eight are in the training split, then one in validation and one in test, and a name is in the same
    split in every world. In revision r a company differs from revision r - 1 with probability ``changed``; a change
    always touches what the company wants in any case. Names, channels and tasks stay.

    ``options["company"]`` of a reset, an index, fixes the company, whether or not it is one of those drawn from; the
    split is then the company's own. ``info`` carries ``company`` (the name) and ``company_index``.

    Args:
        companies: how many companies tasks are drawn from, 1 to 2000, of all splits together.
        first: the index of the first of them. Raised by ``companies``, it brings as many that are all new.
        world: the seed of all companies.
        revision: how often requirements have changed so far, 0 to 100.
        changed: the share of companies that a revision changes.
        dependent: the share of companies whose requirement depends on the matter or the day.
        max_facts: how many facts can be gathered, and the most that a company wants, 1 to 4. The turns of an episode
            follow from it: twice as many and two more.
        fact_cost: what each gathered fact takes off the reward of a settled matter, 0 to 0.2.

    Raises:
        RecipeError: for a parameter out of its range, or one fact at most with requirements that depend on something.
    """

    name = "helpdesk"
    max_turns = 8
    max_actions_per_turn = 1

    def __init__(
        self,
        companies: int = 500,
        first: int = 0,
        world: int = 0,
        revision: int = 0,
        changed: float = 0.3,
        dependent: float = 0.4,
        max_facts: int = 3,
        fact_cost: float = 0.05,
    ) -> None:
        self.max_facts = whole_number("max_facts", max_facts, 1, len(FACTS) - 1)
        # Every fact gathered and given, the company reached, and one action to spare.
        super().__init__(max_steps=2 * self.max_facts + 2)
        self.max_turns = self.max_steps
        self.first = whole_number("first", first, 0, MAX_COMPANIES - 1)
        self.companies = whole_number("companies", companies, 1, MAX_COMPANIES)
        if self.first + self.companies > MAX_COMPANIES:
            raise RecipeError(
                f"{self.companies} companies from {self.first} on go beyond the {MAX_COMPANIES} of a world; lower "
                "first or companies."
            )
        self.world = whole_number("world", world, 0, 2**32 - 1)
        self.revision = whole_number("revision", revision, 0, 100)
        self.changed = real_number("changed", changed, 0.0, 1.0)
        self.dependent = real_number("dependent", dependent, 0.0, 1.0)
        if self.max_facts == 1 and self.dependent:
            raise RecipeError(
                "With max_facts 1 there is no room for a fact that depends on something; set dependent=0."
            )
        self.fact_cost = real_number("fact_cost", fact_cost, 0.0, 0.2)
        window = range(self.first, self.first + self.companies)
        self._members = {split: [i for i in window if company_split(i) == split] for split in SPLITS}
        self._known: dict[int, Company] = {}
        self._asked_for: int | None = None
        self._company = self.company(self.first)
        self._customer, self._matter, self._day = "", "", ""
        self._ready: list[str] = []
        self._given: list[str] = []
        self._reached = False
        self._text, self._meaning = "", ""

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        facts = "1 fact" if self.max_facts == 1 else f"{self.max_facts} facts"
        return (
            "Settle the matter of a customer with a company. The company tells which facts it wants only after you "
            f"reach it. Then it is too late to get them, so get them first, {facts} at most, and no needless ones.\n"
            f"First: {', '.join(GATHER.values())}. Then reach it: call a phone, open form on the web.\n"
            f"Then: {', '.join(GIVE.values())}. To give up: hang up, close form."
        )

    def company(self, index: int) -> Company:
        """A company of this world, as it is in this revision.

        Args:
            index: from 0 to ``MAX_COMPANIES`` - 1, whether or not tasks are drawn from it.

        Raises:
            RecipeError: for another index.
        """
        whole_number("company", index, 0, MAX_COMPANIES - 1)
        if index not in self._known:
            rng = np.random.default_rng([self.world, index, 0])
            channel = "phone" if rng.random() < 0.6 else "form"
            requirement = _draw_requirement(rng, self.max_facts, self.dependent)
            for stage in range(1, self.revision + 1):
                rng = np.random.default_rng([self.world, index, stage])
                if rng.random() < self.changed:
                    before = set(requirement.always)
                    while set(requirement.always) == before:
                        requirement = _draw_requirement(rng, self.max_facts, self.dependent)
            self._known[index] = Company(index, company_names(self.world)[index], channel, requirement)
        return self._known[index]

    @property
    def wanted(self) -> tuple[str, ...]:
        """The facts that the company wants in the present matter, which no observation tells before it is reached."""
        self._need_reset()
        return self._company.requirement.wanted(self._matter, self._day)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode; see :class:`Helpdesk` for ``options["company"]`` and :meth:`TextEnv.reset` for the rest.

        Raises:
            RecipeError: for a split that does not exist, a company that does not exist or is in another split, or a
                chance that is not a whole number from 0 on.
            EnvironmentFault: when no company that tasks are drawn from is in this split.
        """
        self._started = False
        self._asked_for = (options or {}).get("company")
        if options is not None and self._asked_for is not None:
            company = self.company(self._asked_for)
            options = {"split": company.split, **options}
            if split_option(options) != company.split:
                raise RecipeError(
                    f"Company {company.index}, {company.name}, belongs to the {company.split} split and not to "
                    f"{options['split']}; ask for that split, or for none."
                )
        return super().reset(seed=seed, options=options)

    def legal_actions(self) -> list[str]:
        """Before the company is reached: gathering, and both ways to reach it. Afterwards: giving, and giving up."""
        self._need_reset()
        if self._reached:
            return [*GIVE.values(), LEAVE[self._company.channel]]
        return [*GATHER.values(), *REACH.values()]

    def parse_action(self, text: str) -> str | None:
        """See :meth:`TextEnv.parse_action`; "ask" and "look up" may stand for each other."""
        self._need_reset()
        verb, _, fact = " ".join(text.casefold().split()).rpartition(" ")
        if not self._reached and verb in ("ask", "look up"):
            return GATHER.get(fact)
        return super().parse_action(text)

    def _draw(self, split: str) -> str:
        members = self._members[split]
        if not members and self._asked_for is None:
            raise EnvironmentFault(
                f"None of the companies {self.first} to {self.first + self.companies - 1} belongs to the {split} "
                "split; ten that follow each other have some of each."
            )
        # Drawn for a company that was asked for too, so that a seed brings the same matter with any company.
        luck = self.np_random.random()
        asked = self._asked_for
        self._company = self.company(members[int(luck * len(members))] if asked is None else asked)
        self._customer, self._matter, self._day, opening = (
            values[int(self.np_random.integers(len(values)))]
            for values in (words.CUSTOMERS, MATTERS, DAYS, words.OPENINGS)
        )
        self._ready, self._given, self._reached, self._meaning = [], [], False, ""
        self._text = opening.format(
            customer=self._customer,
            company=self._company.name,
            matter=self._matter,
            day=self._day,
            channel=words.CHANNEL_WORDS[self._company.channel],
        )
        return self._text

    def _foreseeable(self, action: str) -> bool:
        # What a company wants is all that one has to be told.
        return action not in REACH.values() or not self._reached

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        self._meaning = ""
        if self._reached:
            return self._in_contact(action)
        if action in REACH.values():
            self._reached = action == REACH[self._company.channel]
            self._text = (
                self._what_is_wanted()
                if self._reached
                else words.WRONG_CHANNEL[self._company.channel].format(company=self._company.name)
            )
            return 0.0, False, False, self._reached
        fact = action.rpartition(" ")[2]
        gathers = fact not in self._ready and len(self._ready) < self.max_facts
        found = words.FOUND if gathers else words.TWICE if fact in self._ready else words.FULL
        if gathers:
            self._ready.append(fact)
        self._text = f"{found} {words.READY.format(facts=', '.join(self._ready))}"
        return 0.0, False, False, gathers

    def _in_contact(self, action: str) -> tuple[float, bool, bool, bool]:
        channel, wanted = self._company.channel, self.wanted
        if action == LEAVE[channel] or set(wanted) - set(self._ready):
            self._text = words.LEFT[channel] if action == LEAVE[channel] else words.LACKING[channel]
            return 0.0, True, False, True
        fact = action.rpartition(" ")[2]
        if fact not in wanted or fact in self._given:
            self._text = words.NEEDLESS[channel]
            return 0.0, False, False, False
        self._given.append(fact)
        if len(self._given) < len(wanted):
            self._text, self._meaning = self._one_of(words.MORE[channel]), "wants more"
            return 0.0, False, False, True
        self._text = words.SETTLED[channel]
        return 1.0 - self.fact_cost * len(self._ready), True, True, True

    def _what_is_wanted(self) -> str:
        requirement = self._company.requirement
        always = [requirement.always[place] for place in self.np_random.permutation(len(requirement.always))]
        self._meaning = f"wants {', '.join(fact for fact in FACTS if fact in always)}"
        phrases = [self._one_of(words.PHRASES[fact]) for fact in always]
        listed = " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)
        told = self._one_of(words.WANT[self._company.channel]).format(facts=listed)
        if not requirement.applies(self._matter, self._day):
            return told
        one, other = requirement.when
        self._meaning += f", for {one} and {other} also {requirement.extra}"
        also = self._one_of(words.ALSO["day" if one in DAYS else "matter"])
        return f"{told} {also.format(one=one, other=other, fact=self._one_of(words.PHRASES[requirement.extra]))}"

    def _one_of(self, texts: tuple[str, ...]) -> str:
        return texts[int(self.np_random.integers(len(texts)))]

    def _observation(self) -> str:
        return self._text

    def _state(self) -> str:
        ready, given = (" ".join(fact for fact in FACTS if fact in facts) for facts in (self._ready, self._given))
        where = f"{self._company.name} {self._customer} {self._matter} {self._day}"
        return f"{where} {'reached' if self._reached else 'before'}, ready {ready}, given {given}"

    def _info(self) -> dict[str, Any]:
        company = self._company
        told = {"company": company.name, "company_index": company.index, "topic": company.name}
        return {**super()._info(), **told, "meaning": self._meaning or self._text}

    def oracle(self) -> list[str]:
        """The shortest way to settle the matter; nothing where it is too late for that, or the episode is over."""
        wanted = self.wanted
        missing = [fact for fact in wanted if fact not in self._ready]
        if missing and (self._reached or len(self._ready) + len(missing) > self.max_facts):
            return []
        plan = [GATHER[fact] for fact in missing]
        if not self._reached:
            plan.append(REACH[self._company.channel])
        plan += [GIVE[fact] for fact in wanted if fact not in self._given]
        return plan if len(plan) <= self.steps_left else []

    def optimal_success(self) -> float:
        """1 as long as the matter can still be settled, or is; else 0."""
        self._need_reset()
        return float(self._success if self._over else bool(self.oracle()))

    def describe(self) -> dict[str, Any]:
        """``customer``, ``company``, ``matter``, ``day``, ``channel``, ``ready`` (facts gathered), ``told`` (facts that
        the company said it wants) and ``given``.

        What the company will want is left out until it has said so, because scripted players say aloud what is
        described.
        """
        self._need_reset()
        return {
            "customer": self._customer,
            "company": self._company.name,
            "matter": self._matter,
            "day": self._day,
            "channel": self._company.channel,
            "ready": list(self._ready),
            "told": list(self.wanted) if self._reached else [],
            "given": list(self._given),
        }
