"""What the exam tells a person, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from memory_server.local import LocalMemory
from memory_server.store.store import Store
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM
from trainer.build import build_model
from trainer.world.exam import Answers, Exam, choose_fact, describe_exam, examine, run_exam
from trainer.world.facts import Fact, World
from trainer.world.store import build_world_store
from trainer.world.tokenizer import PAD, VOCABULARY, world_tokenizer
from trainer.world.words import THINGS

FACT = Fact(id=7, giver="mira", verb="sold", receiver="tobar", thing="honey")


def untrained() -> PlugLMForMaskedLM:
    config = PlugLMConfig(
        vocab_size=len(VOCABULARY),
        pad_token_id=PAD,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        key_size=8,
    )
    return build_model(config, seed=0)


def test_the_lines_tell_the_dialogue_and_the_shares() -> None:
    answers = Answers(
        answers=("honey",) * 500,
        accuracy=0.996,
        accuracy_without_memory=0.012,
        right_entry_rate=0.998,
    )
    exam = Exam(
        k=5,
        first=answers,
        fact=FACT,
        edited=FACT.with_thing("salt", id=900),
        answer="honey",
        answer_after_edit="salt",
        others_unchanged_by_edit=0.995,
        removed=100,
        accuracy_on_removed=0.02,
        accuracy_on_kept=0.97,
        answer_after_removal="figs",
        answer_after_rollback="honey",
        unchanged_by_rollback=1.0,
        edited_together=90,
        accuracy_on_edited=0.944,
        old_answers_on_edited=0.011,
        others_unchanged_by_edits=0.993,
        unchanged_at_the_end=1.0,
    )
    told = "\n".join(describe_exam(exam))
    asked = "mira sold tobar [MASK] -> "
    answered = [line.removeprefix(asked) for line in map(str.strip, told.splitlines())]
    assert [word for word in answered if word in THINGS] == ["honey", "salt", "figs", "honey"]
    assert 'the memory now says "mira sold tobar salt"' in told
    for share in ("99.6%", "99.8%", "1.2%", "99.5%", "2.0%", "97.0%", "100.0%", "499", "top 5"):
        assert share in told
    for share in ("90 facts are edited", "94.4%", "1.1%", "99.3%"):
        assert share in told


def test_an_untrained_model_fails_and_leaves_memory_and_store_as_they_were(tmp_path: Path) -> None:
    model, tokenizer = untrained(), world_tokenizer()
    build_world_store(tmp_path / "s", worlds=1, seed=1, size=150, tokenizer_fingerprint="words")
    store, facts = Store.open(tmp_path / "s"), World(1, 0, 150).facts
    factory = KeyEncoderFactory(model.config.to_dict())
    with LocalMemory(store, encoder=factory, weights=model.key_weights()) as memory:
        before = store.head()
        exam = run_exam(model, memory, store, tokenizer, facts, k=3, remove=20, edit=30)
        assert memory.info().content_version == before
        assert store.manifest().entries == 150
        assert exam.first.accuracy <= 0.1
        # Retrieval is exact, so whatever the model thinks, the same version gives the same answers.
        assert exam.unchanged_by_rollback == exam.unchanged_at_the_end == 1.0
        assert exam.edited_together == 30
        assert exam.first == examine(model, memory, tokenizer, facts, k=3)
        for remove in (0, 150):
            with pytest.raises(ValueError, match=f"remove={remove}: must be from 1 to 149"):
                run_exam(model, memory, store, tokenizer, facts, k=3, remove=remove)
            with pytest.raises(ValueError, match=f"edit={remove}: must be from 1 to 149"):
                run_exam(model, memory, store, tokenizer, facts, k=3, remove=9, edit=remove)
        assert store.manifest().entries == 150


def test_the_fact_that_is_changed_is_answered_right_and_cannot_be_read_elsewhere() -> None:
    like = Fact(id=8, giver="mira", verb="gave", receiver="pibar", thing="honey")
    other = Fact(id=9, giver="kalin", verb="lent", receiver="hudan", thing="honey")
    facts = (FACT, like, other)
    assert choose_fact(facts, ["honey"] * 3) == 2
    assert choose_fact((FACT, other), ["honey"] * 2) == 0
    # Better one that is answered right than one that stands alone; else any.
    assert choose_fact(facts, ["tea", "honey", "tea"]) == 1
    assert choose_fact(facts, ["tea"] * 3) == 0
