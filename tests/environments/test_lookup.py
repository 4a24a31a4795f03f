"""Lookup: every answer is written where it should be, and no split knows another's names."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.environments import SPLITS
from rehearsal.environments.lookup import Lookup
from rehearsal.environments.lookup_world import MAX_HOPS, MAX_PEOPLE, lookup_questions, lookup_world
from rehearsal.environments.splits import content_split
from rehearsal.errors import RecipeError


@pytest.mark.parametrize("hops", range(1, MAX_HOPS + 1))
def test_the_documents_lead_to_the_answer(hops):
    documents = {document.title: document.text for document in lookup_world(3, "test", 60).documents}
    questions = lookup_questions(3, "test", 60, hops)
    assert len(questions) > 50
    for question in questions:
        assert len(question.documents) == hops
        # The question names the first document, each document names the next, and the last one tells the answer.
        assert question.documents[0] in question.text
        for title, following in zip(question.documents, [*question.documents[1:], question.answer], strict=True):
            assert re.search(rf"\b{re.escape(following)}\b", documents[title]), question
        assert hops == 1 or question.answer not in question.text


def test_titles_are_the_only_ones():
    documents = lookup_world(0, "train", MAX_PEOPLE).documents
    assert len({document.title for document in documents}) == len(documents)
    assert all(document.title in document.text for document in documents)


def test_no_split_knows_the_names_of_another():
    names = {}
    for split in SPLITS:
        worlds = [lookup_world(world, split, 60) for world in range(5)]
        # First names are everybody's.
        names[split] = {document.title.split()[-1] for world in worlds for document in world.documents}
        assert all(content_split(name) == split for name in names[split])
    assert not names["train"] & names["test"]
    assert not names["train"] & names["validation"]


def test_a_world_is_made_from_its_seed():
    assert lookup_world(1, "train", 24) == lookup_world.__wrapped__(1, "train", 24)
    assert lookup_world(1, "train", 24) != lookup_world(2, "train", 24)


@given(st.text(min_size=1))
def test_no_text_is_too_odd(text):
    env = Lookup(people=12)
    env.reset(seed=0)
    if text.strip():
        assert env.step(text)[1] in (0.0, 1.0)


def test_the_right_answer_and_others():
    env = Lookup(hops=2)
    for seed in range(20):
        _, info = env.reset(seed=seed, options={"split": "test"})
        (answer,) = env.oracle()
        said, reward, terminated, _, info = env.step(f"The {answer.upper()}.")
        assert (said, reward, terminated, info["success"]) == ("right", 1.0, True, True)
        env.reset(seed=seed, options={"split": "test"})
        assert env.step(f"not {answer}")[:3] == ("wrong", 0.0, True)


def test_the_corpus_is_that_of_the_split():
    env = Lookup()
    env.reset(seed=0, options={"split": "validation"})
    assert env.documents() == env.documents("validation") != env.documents("train")


@pytest.mark.parametrize(
    ("params", "told"), [({"hops": 4}, "hops"), ({"people": 5}, "people"), ({"world": -1}, "world")]
)
def test_parameters_out_of_range(params, told):
    with pytest.raises(RecipeError, match=told):
        Lookup(**params)
