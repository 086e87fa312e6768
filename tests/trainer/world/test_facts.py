"""Worlds are reproducible, tell nothing about each other, and read as sentences."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.world.facts import IDS_PER_WORLD, World, another_thing
from trainer.world.words import GIVERS, RECEIVERS, THINGS, VERBS


def subjects(world: World) -> list[tuple[str, str, str]]:
    return [fact.words[:3] for fact in world.facts]


def test_the_words_are_as_many_as_promised_and_every_one_has_one_role() -> None:
    assert [len(GIVERS), len(RECEIVERS), len(VERBS), len(THINGS)] == [40, 40, 10, 100]
    words = (*GIVERS, *RECEIVERS, *VERBS, *THINGS)
    assert len(set(words)) == len(words)
    assert all(word.isalpha() and word.islower() for word in words)


@settings(deadline=None)
@given(seed=st.integers(0, 2**40), index=st.integers(0, 10**6), size=st.integers(1, 700))
def test_a_world_is_a_function_of_seed_and_index(seed: int, index: int, size: int) -> None:
    world = World(seed, index, size)
    assert world.facts == World(seed, index, size).facts
    assert len(set(subjects(world))) == size
    assert [fact.id for fact in world.facts] == [index * IDS_PER_WORLD + n for n in range(size)]


def test_a_fact_reads_as_a_sentence_and_its_question_leaves_the_thing_out() -> None:
    fact = World(0, 0).facts[0]
    assert fact.text == f"{fact.giver} {fact.verb} {fact.receiver} {fact.thing}"
    assert fact.question == f"{fact.giver} {fact.verb} {fact.receiver} [MASK]"


def test_one_world_does_not_tell_the_things_of_another() -> None:
    worlds = [World(7, index) for index in range(30)]
    seen: dict[tuple[str, str, str], str] = {}
    repeated = same = 0
    for world in worlds:
        for fact in world.facts:
            before = seen.get(fact.words[:3])
            repeated += before is not None
            same += before == fact.thing
            seen[fact.words[:3]] = fact.thing
    # About 5,000 subjects occur again, and by chance 1 % of them with the same thing.
    assert repeated > 3000
    assert same / repeated < 0.03
    assert World(8, 0).facts != worlds[0].facts


def test_words_are_drawn_evenly() -> None:
    facts = [fact for index in range(40) for fact in World(1, index).facts]
    for role, words in enumerate((GIVERS, VERBS, RECEIVERS, THINGS)):
        counts = Counter(fact.words[role] for fact in facts)
        expected = len(facts) / len(words)
        assert set(counts) == set(words)
        assert max(abs(count - expected) for count in counts.values()) < 6 * expected**0.5


def test_questions_depend_on_the_step_and_reach_every_fact() -> None:
    world = World(3, 0)
    first = world.questions(0, 64)
    np.testing.assert_array_equal(first, world.questions(0, 64))
    assert (first != world.questions(1, 64)).any()
    asked = np.concatenate([world.questions(step, 64) for step in range(100)])
    assert set(asked.tolist()) == set(range(500))


def test_editing_a_fact_changes_its_thing_only() -> None:
    fact = World(0, 0).facts[0]
    thing = another_thing(fact, avoid=[THINGS[0]])
    assert thing not in (fact.thing, THINGS[0])
    edited = fact.with_thing(thing, id=777)
    assert edited.words == (*fact.words[:3], thing)
    assert edited.id == 777
    with pytest.raises(ValueError, match="no thing of the synthetic world"):
        fact.with_thing("mira")
    with pytest.raises(ValueError, match="avoid fewer"):
        another_thing(fact, avoid=THINGS)


@pytest.mark.parametrize("values", [(0, -1, 5), (0, 0, 0), (0, 0, IDS_PER_WORLD + 1)])
def test_impossible_worlds_are_refused(values: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="world index="):
        World(*values)
