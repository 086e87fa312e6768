"""The retrieval warm-up loss against a formulation query by query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.losses import retrieval_loss
from model.retrieval import LayerRetrieval
from tests.reference.formulas import cloze_loss
from tests.reference.worlds import Answer, assert_close, document_of, make_world

B, K, Q = 5, 4, 8


def case() -> tuple[LayerRetrieval, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(10, 60, (B, K))
    retrieval = LayerRetrieval(
        layer=2,
        query_BQ=torch.randn(B, Q, dtype=torch.float64, requires_grad=True),
        key_BKQ=torch.randn(B, K, Q, dtype=torch.float64, requires_grad=True),
        retrieved=Answer(ids=ids, tokens=torch.zeros(B, K, 1), doc_ids=document_of(ids)),
    )
    return retrieval, torch.randn(B, Q, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("positive_ids", "doc_ids"),
    [
        ([10, 21, 32, 43, 54], [1, 2, 3, 4, 5]),
        ([10, 11, 10, 43, 30], [1, 1, 1, 4, 3]),  # three sequences of one document
        ([10, -1, 32, -1, 54], [1, 2, 3, 4, 5]),  # two without a right entry
        ([-1, -1, -1, 43, 54], [-1, -1, -1, 4, 5]),  # and without a document
        ([-1, -1, -1, -1, -1], [1, 2, 3, 4, 5]),  # nothing to learn
    ],
)
def test_it_equals_the_formulation_query_by_query(
    positive_ids: list[int], doc_ids: list[int]
) -> None:
    retrieval, positive = case()
    ids, docs = torch.tensor(positive_ids), torch.tensor(doc_ids)
    given = retrieval_loss(retrieval, positive, ids, docs)
    wanted = cloze_loss(retrieval.query_BQ, positive, ids, docs)
    assert_close(given, wanted, 1e-12, "loss", floor=1e-9)
    leaves = [retrieval.query_BQ, positive]
    grads = torch.autograd.grad(given, leaves)
    others = torch.autograd.grad(wanted, leaves, materialize_grads=True)
    for grad, other in zip(grads, others, strict=True):
        assert_close(grad, other, 1e-10, "gradient", floor=1e-9)


def test_what_was_retrieved_is_no_negative() -> None:
    retrieval, positive = case()
    ids, docs = torch.tensor([10, 21, 32, 43, 54]), torch.tensor([1, 2, 3, 4, 5])
    before = retrieval_loss(retrieval, positive, ids, docs)
    with torch.no_grad():
        retrieval.key_BKQ.mul_(100)
    assert torch.equal(retrieval_loss(retrieval, positive, ids, docs), before)


def test_the_model_adds_it_with_its_weight_over_all_memory_layers() -> None:
    world = make_world(num_memory_layers=2)
    rows = [3, 5, 1, 7]
    positive_ids = world.memory.ids_N[rows]
    options = {
        "labels": world.labels,
        "lookup": world.memory.lookup,
        "positive_tokens": world.memory.tokens_NS[rows],
        "positive_ids": positive_ids,
        "doc_ids": document_of(positive_ids),
    }
    model = world.model
    plain = model(**world.inputs, labels=world.labels, lookup=world.memory.lookup)
    given = model(**world.inputs, **options, retrieval_loss_weight=0.25)
    keys = model.pluglm.entry_keys(options["positive_tokens"])
    wanted = [
        cloze_loss(r.query_BQ, keys, positive_ids, options["doc_ids"]) for r in plain.retrievals
    ]
    assert plain.retrieval_loss is None
    assert_close(given.mlm_loss, plain.loss, 1e-12, "masked-LM loss")
    assert_close(given.retrieval_loss, (wanted[0] + wanted[1]) / 2, 1e-10, "retrieval loss")
    assert_close(given.loss, plain.loss + (wanted[0] + wanted[1]) / 8, 1e-10, "loss")
    given.retrieval_loss.backward()
    assert model.pluglm.layers[2].query_proj.weight.grad is not None
    assert model.pluglm.entry_encoder.key_proj.weight.grad is not None


def test_it_refuses_to_be_asked_for_without_what_it_needs() -> None:
    world = make_world()
    tokens = world.memory.tokens_NS[:4]
    ids = world.memory.ids_N[:4]
    with pytest.raises(ValueError, match="positive_ids and doc_ids"):
        world.model(
            **world.inputs, labels=world.labels, lookup=world.memory.lookup, positive_tokens=tokens
        )
    for model in (world.model, make_world(num_memory_layers=0).model):
        with pytest.raises(ValueError, match=r"needs a lookup .* at least one memory layer"):
            model(
                **world.inputs,
                labels=world.labels,
                positive_tokens=tokens,
                positive_ids=ids,
                doc_ids=document_of(ids),
            )


def test_the_denominator_is_the_trainers_where_it_gives_one() -> None:
    world = make_world()
    world.model.eval()
    batch = world.inputs | {"labels": world.labels}
    whole = world.model(**batch, lookup=world.memory.lookup).loss
    parts = [
        world.model(
            **{name: value[rows] for name, value in batch.items()},
            lookup=world.memory.lookup,
            loss_denominator=6,
        ).loss
        # The second part holds one label, the first five, one sequence none at all.
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert_close(parts[0] + parts[1], whole, 1e-12, "the sum of the parts")


def test_a_temperature_divides_the_scores() -> None:
    retrieval, positive = case()
    ids, docs = torch.tensor([10, 21, 32, 43, 54]), torch.tensor([1, 2, 3, 4, 5])
    given = retrieval_loss(retrieval, positive, ids, docs, 0.25)
    wanted = cloze_loss(retrieval.query_BQ * 4, positive, ids, docs)
    assert_close(given, wanted, 1e-12, "loss")
