"""What a memory layer asks for, what it does with the answer, and what it does without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import PlugLMForMaskedLM
from tests.reference.pluglm_reference import Reference
from tests.reference.worlds import Answer, FlatMemory, assert_close, leaves, make_world


def run(world: Any, **options: Any) -> Any:
    return world.model(**world.inputs, **options)


def test_queries_are_detached_float32_and_one_per_sequence() -> None:
    world = make_world(num_memory_layers=2)
    output = run(world, lookup=world.memory.lookup)
    assert [q.shape for q in world.memory.calls] == [(4, 8), (4, 8)]
    for query, retrieval in zip(world.memory.calls, output.retrievals, strict=True):
        assert query.dtype == torch.float32
        assert not query.requires_grad
        torch.testing.assert_close(query, retrieval.query_BQ.detach().float())
    assert [r.layer for r in output.retrievals] == [1, 2]


def test_stale_keys_decide_what_is_found_and_fresh_ones_how_it_is_read() -> None:
    world = make_world(k=3)
    right = run(world, lookup=world.memory.lookup)
    stale = world.memory.keys_NQ
    # Stretching every stored key changes neither the ranking nor, therefore, anything else.
    longer = FlatMemory(stale * 3.0, world.memory.tokens_NS, world.memory.ids_N, 3)
    torch.testing.assert_close(run(world, lookup=longer.lookup).logits, right.logits)
    # Other stored keys find other entries.
    turned = FlatMemory(-stale, world.memory.tokens_NS, world.memory.ids_N, 3)
    other = run(world, lookup=turned.lookup)
    assert not torch.equal(other.retrievals[0].retrieved.ids, right.retrievals[0].retrieved.ids)
    with torch.no_grad():
        fresh = world.model.pluglm.entry_keys(right.retrievals[0].retrieved.tokens.flatten(0, 1))
    torch.testing.assert_close(right.retrievals[0].key_BKQ.detach().flatten(0, 1), fresh)


def test_the_loss_teaches_queries_and_keys_only_by_the_similarity_bias() -> None:
    world = make_world()
    retriever = ("query_proj", "query_norm", "layers.2.pooler", "key_proj")

    def taught() -> set[str]:
        world.model.zero_grad()
        run(world, labels=world.labels, lookup=world.memory.lookup).loss.backward()
        return {
            name
            for name, p in world.model.named_parameters()
            if p.grad is not None and float(p.grad.abs().max()) > 1e-12
        }

    assert all(any(part in name for name in taught()) for part in retriever)
    with torch.no_grad():
        world.model.pluglm.layers[2].knowledge_attention.beta.zero_()
    blind = taught()
    assert not any(part in name for part in retriever for name in blind)
    assert any("value_proj" in name for name in blind)


def test_without_a_lookup_there_is_no_memory_term() -> None:
    world = make_world(num_memory_layers=2)
    before = run(world)
    assert before.retrievals == ()
    assert not torch.allclose(before.logits, run(world, lookup=world.memory.lookup).logits)
    # Whatever the memory's parameters are: they take no part.
    with torch.no_grad():
        for name, parameter in world.model.named_parameters():
            if any(p in name for p in ("knowledge", "entry_encoder", "query_", ".pooler")):
                parameter.add_(1.0)
    assert torch.equal(run(world).logits, before.logits)
    # And training without a memory moves no statistics of queries that were never made.
    buffers = {name: b.clone() for name, b in world.model.named_buffers()}
    world.model.train()
    run(world, labels=world.labels).loss.backward()
    assert all(torch.equal(b, buffers[name]) for name, b in world.model.named_buffers())


@pytest.mark.parametrize("pooling", ["shared", "tokens"])
def test_an_answer_without_any_entry_equals_no_lookup(pooling: str) -> None:
    world = make_world(value_pooling=pooling)

    def nothing(queries_BQ: Tensor) -> Answer:
        none = torch.full((4, 3), -1)
        # What stands in the token places of a missing entry must not matter.
        return Answer(ids=none, tokens=torch.full((4, 3, 6), 7), doc_ids=none)

    torch.testing.assert_close(run(world, lookup=nothing).logits, run(world).logits)


@pytest.mark.parametrize("pooling", ["shared", "separate", "tokens"])
def test_pads_change_nothing(pooling: str) -> None:
    """More places than entries, longer rows of pads, and batch-mates leave a sequence as it is."""
    world = make_world(value_pooling=pooling, entries=2, k=2, query_norm="layer")
    wanted = run(world, lookup=world.memory.lookup).logits
    memory = world.memory
    wider = torch.cat([memory.tokens_NS, torch.zeros(2, 4, dtype=torch.int64)], 1)
    padded = FlatMemory(memory.keys_NQ, wider, memory.ids_N, 5)
    torch.testing.assert_close(run(world, lookup=padded.lookup).logits, wanted)
    for row, length in enumerate(world.inputs["attention_mask"].sum(1).tolist()):
        alone = {name: value[row : row + 1, :length] for name, value in world.inputs.items()}
        given = world.model(**alone, lookup=memory.lookup).logits
        torch.testing.assert_close(given[0], wanted[row, :length])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value_pooling": "tokens"},
        {"memory_attention": "sentence_level"},
        {"num_memory_layers": 2},
        {"num_memory_layers": 0},
        {"legacy": True},
    ],
    ids=str,
)
def test_only_the_labelled_positions_give_what_all_positions_give(settings: dict[str, Any]) -> None:
    world = make_world(**settings)
    every = run(world, lookup=world.memory.lookup)
    some = run(world, labels=world.labels, lookup=world.memory.lookup)
    chosen = world.labels != world.model.config.ignored_label
    assert some.logits.shape == (6, 40)
    assert_close(some.logits, every.logits[chosen], 1e-12, "logits")
    wanted = torch.nn.functional.cross_entropy(every.logits[chosen], world.labels[chosen])
    assert_close(some.loss, wanted, 1e-12, "loss")
    assert torch.equal(some.loss, some.mlm_loss)
    without = run(world, labels=world.labels)
    assert_close(without.logits, run(world).logits[chosen], 1e-12, "logits without memory")


def test_a_batch_without_labels_has_loss_zero_and_zero_gradients() -> None:
    world = make_world()
    labels = torch.full_like(world.labels, -100)
    output = run(world, labels=labels, lookup=world.memory.lookup)
    assert float(output.loss.detach()) == 0.0
    assert output.logits.shape == (0, 40)
    output.loss.backward()
    assert all(
        p.grad is None or torch.equal(p.grad, torch.zeros_like(p.grad))
        for p in world.model.parameters()
    )


@pytest.mark.parametrize("pooling", ["shared", "tokens"])
@pytest.mark.parametrize("attention", ["multi_head", "single_head"])
def test_the_reported_attention_is_a_share_per_entry(attention: str, pooling: str) -> None:
    world = make_world(memory_attention=attention, value_pooling=pooling)
    (retrieval,) = run(
        world, lookup=world.memory.lookup, output_attention=True, labels=world.labels
    ).retrievals
    share = retrieval.attention_BATK
    assert share is not None
    assert share.shape == (4, 4 if attention == "multi_head" else 1, 3, 3)
    torch.testing.assert_close(share.sum(-1), torch.ones_like(share[..., 0]))
    (silent,) = run(world, lookup=world.memory.lookup).retrievals
    assert silent.attention_BATK is None


def test_sentence_level_attention_reports_the_softmax_of_the_cosines() -> None:
    world = make_world(memory_attention="sentence_level")
    (r,) = run(world, lookup=world.memory.lookup, output_attention=True).retrievals
    cos = torch.nn.functional.cosine_similarity(r.query_BQ[:, None], r.key_BKQ, dim=-1)
    assert r.attention_BATK is not None
    torch.testing.assert_close(r.attention_BATK[:, 0, 0], torch.softmax(cos, -1))


def test_too_many_tokens_are_refused_with_both_numbers() -> None:
    model: PlugLMForMaskedLM = make_world().model
    with pytest.raises(ValueError, match=r"13 tokens.*12 positions.*max_position_embeddings"):
        model(torch.ones(1, 13, dtype=torch.int64))


def test_the_cosine_of_vectors_near_zero_fades_as_its_epsilon_says() -> None:
    world = make_world(query_norm="none")
    encoder = world.model.pluglm.entry_encoder
    with torch.no_grad():
        for linear in (world.model.pluglm.layers[2].query_proj, encoder.key_proj):
            linear.weight.mul_(2e-9)
            linear.bias.mul_(2e-9)
    given = run(world, lookup=world.memory.lookup)
    lengths = given.retrievals[0].query_BQ.norm(dim=-1)
    assert (lengths < 1e-8).any()
    assert (lengths > 1e-9).all()
    reference = Reference(leaves(world.model), world.model.config.to_dict(), training=False)
    wanted = reference.run(*world.inputs.values(), memory=world.memory.stored, k=world.memory.k)
    assert torch.equal(given.retrievals[0].retrieved.ids, wanted.ids[0])
    assert_close(given.logits, wanted.logits, 1e-9, "logits")
