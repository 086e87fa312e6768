"""What the memory is worth: the right one, a shuffled one and none, each counted exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional as F

from memory_server.api import Memory, Retrieved
from tests.trainer.small_world import SmallWorld, small_world
from trainer.data.masking import MaskingSettings
from trainer.data.sequences import SequenceBatch
from trainer.data.stream import TrainBatch
from trainer.data.vocab import VocabTables
from trainer.evaluate import (
    OWN_DOCUMENT_OUT,
    OWN_ENTRY,
    MaskedSum,
    Search,
    describe_evaluation,
    evaluate_batch,
    evaluate_case,
    evaluation_report,
    heldout_batches,
    right_entries,
    shuffled,
)

K = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallWorld]:
    with small_world(tmp_path_factory.mktemp("world")) as made:
        made.model.eval()
        yield made


def reply(batch: int, k: int = 2) -> Retrieved:
    rows_BK = torch.arange(batch)[:, None].expand(batch, k)
    return Retrieved(
        ids=rows_BK,
        scores=rows_BK.float(),
        tokens=rows_BK[..., None].expand(batch, k, 4),
        doc_ids=rows_BK + 100,
        epoch=5,
        encoder_step=9,
    )


class Dataset:
    """`n` sequences of 10 tokens; each begins with its own number as a word."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def gather(self, indices: NDArray[np.integer]) -> SequenceBatch:
        rows = np.asarray(indices, dtype=np.int64)
        tokens = np.repeat(rows[:, None] % 40 + 5, 10, axis=1)
        zeros = np.zeros(len(rows), dtype=np.int32)
        return SequenceBatch(input_ids=tokens, doc_ids=rows, first_entry=zeros, num_entries=zeros)


def masking() -> MaskingSettings:
    special = np.arange(50) < 5
    return MaskingSettings(
        mask_probability=0.2,
        vocab=VocabTables(
            pad_token_id=0,
            mask_token_id=4,
            special=special,
            word_start=np.ones(50, dtype=np.bool_),
            rarity=np.where(special, 0.0, 0.5).astype(np.float32),
        ),
    )


# --- held-out batches -----------------------------------------------------------------------------


@given(n=st.integers(1, 150), sequences=st.integers(1, 200), world_size=st.integers(1, 4))
def test_every_rank_gets_as_many_held_out_batches_and_no_sequence_comes_twice(
    n: int, sequences: int, world_size: int
) -> None:
    sizes, seen = [], []
    for rank in range(world_size):
        batches = list(
            heldout_batches(
                Dataset(n),
                None,
                masking(),
                sequences=sequences,
                rank=rank,
                world_size=world_size,
            )
        )
        sizes.append([len(batch.doc_ids) for batch in batches])
        seen += [int(d) for batch in batches for d in batch.doc_ids]
    assert all(size == sizes[0] for size in sizes)
    assert len(seen) == len(set(seen))
    assert min(sequences, n) - len(seen) in range(world_size)


def test_held_out_batches_are_the_same_every_time() -> None:
    first, second = (
        list(heldout_batches(Dataset(70), None, masking(), sequences=70)) for _ in range(2)
    )
    assert len(first) == len(second) == 3
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, 3, 4, 7, 32])
def test_a_shuffled_memory_gives_every_sequence_another_ones_entries(batch: int) -> None:
    found = shuffled(lambda queries_BQ: reply(len(queries_BQ)))(torch.zeros(batch, 4))
    owner_B = found.ids[:, 0]
    assert not (owner_B == torch.arange(batch)).any()
    assert sorted(owner_B.tolist()) == list(range(batch)), "as many and as plausible"
    assert torch.equal(found.tokens[:, 0, 0], owner_B)
    assert torch.equal(found.doc_ids[:, 0], owner_B + 100)
    assert torch.equal(found.scores[:, 0], owner_B.float())
    assert (found.epoch, found.encoder_step) == (5, 9)


def test_masked_sums_add_up_to_means_over_all_masks() -> None:
    total = MaskedSum(loss=6.0, correct=1.0, masks=2.0) + MaskedSum(
        loss=2.0, correct=1.0, masks=6.0
    )
    assert total.means() == {"loss": 1.0, "accuracy": 0.25, "masks": 8.0}
    assert MaskedSum().means() == {"loss": 0.0, "accuracy": 0.0, "masks": 0.0}


def test_a_sequence_without_a_right_entry_is_not_asked_for_one() -> None:
    found = replace(reply(4), ids=torch.tensor([[7, 8], [9, 7], [1, -1], [-1, -1]]))
    assert right_entries(found, torch.tensor([8, 8, 1, -1])) == (2.0, 3.0)


def search_of(memory: Memory) -> Search:
    return lambda queries_BQ: memory.search(queries_BQ, K)


def test_each_condition_is_what_the_model_says_with_that_memory(world: SmallWorld) -> None:
    """Against the whole logits and torch's own cross-entropy."""
    batch = world.batch(slice(0, 12))
    search = search_of(world.memory)
    sums, found, asked = evaluate_batch(world.model, batch, search)
    assert asked == 12
    lookups = {"right": search, "shuffled": shuffled(search), "none": None}
    assert set(sums) == set(lookups)
    for name, lookup in lookups.items():
        with torch.no_grad():
            output = world.model(batch.input_ids, batch.attention_mask, lookup=lookup)
        logits_mV = output.logits[batch.labels >= 0]
        labels_m = batch.labels[batch.labels >= 0]
        loss = float(F.cross_entropy(logits_mV, labels_m, reduction="sum"))
        assert sums[name].loss == pytest.approx(loss, rel=1e-5)
        assert sums[name].correct == float((logits_mV.argmax(-1) == labels_m).sum())
        assert sums[name].masks == 12
        if name == "right":
            ids_BK = output.retrievals[-1].retrieved.ids
            hits = sum(int(i) in row for i, row in zip(batch.doc_ids, ids_BK.tolist(), strict=True))
            assert found == hits
    losses = {round(s.loss, 3) for s in sums.values()}
    assert len(losses) == 3, "the conditions differ"


def test_one_sequence_alone_has_no_other_ones_entries(world: SmallWorld) -> None:
    sums, _, _ = evaluate_batch(world.model, world.batch(slice(0, 1)), search_of(world.memory))
    assert set(sums) == {"right", "none"}


# --- whole cases ----------------------------------------------------------------------------------


def two_batches(world: SmallWorld) -> Iterator[TrainBatch]:
    yield world.batch(slice(0, 9))
    yield world.batch(slice(9, 20))


def test_a_case_is_the_mean_over_all_its_batches(world: SmallWorld) -> None:
    world.model.train()
    case = evaluate_case(
        world.model, world.memory, two_batches(world), k=K, exclude_own_document=False
    )
    assert not world.model.training, "dropout is off"
    parts = [evaluate_batch(world.model, b, search_of(world.memory)) for b in two_batches(world)]
    for name in ("right", "shuffled", "none"):
        total = parts[0][0][name] + parts[1][0][name]
        assert case["conditions"][name] == pytest.approx(total.means())
    assert case["right_entry_rate"] == (parts[0][1] + parts[1][1]) / 20


def test_a_texts_own_document_is_left_out_when_asked(world: SmallWorld) -> None:
    """Every fact is a document, so without its own none is ever found."""
    case = evaluate_case(
        world.model, world.memory, two_batches(world), k=20, exclude_own_document=False
    )
    assert case["right_entry_rate"] == 1.0, "20 of 20 entries"
    out = evaluate_case(
        world.model, world.memory, two_batches(world), k=20, exclude_own_document=True
    )
    assert out["right_entry_rate"] == 0.0
    assert out["conditions"]["right"]["loss"] != case["conditions"]["right"]["loss"]
    assert out["conditions"]["none"] == case["conditions"]["none"]


class Degraded:
    """A memory of which a shard is lost during the second search."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._searches = memory, 0

    def search(
        self, queries_BQ: torch.Tensor, k: int, *, exclude_doc_ids: torch.Tensor | None = None
    ) -> Retrieved:
        self._searches += 1
        found = self._memory.search(queries_BQ, k, exclude_doc_ids=exclude_doc_ids)
        return replace(found, missing_shards=(1,) if self._searches == 2 else ())


def test_a_case_says_when_shards_were_missing(world: SmallWorld) -> None:
    memory = cast(Memory, Degraded(world.memory))
    report = evaluation_report(world.model, memory, lambda: two_batches(world), k=K)
    own, out = report["cases"]
    assert own["missing_shards"] is True
    assert "missing_shards" not in out
    (line,) = [line for line in describe_evaluation(report) if "not all shards" in line]
    assert describe_evaluation(report).index(line) == 3


def test_the_report_tells_own_entries_from_others(world: SmallWorld) -> None:
    report = evaluation_report(world.model, world.memory, lambda: two_batches(world), k=K)
    assert (report["k"], report["masks"]) == (K, 20)
    assert [case["name"] for case in report["cases"]] == [OWN_ENTRY, OWN_DOCUMENT_OUT]
    own, out = report["cases"]
    assert 0 < own["right_entry_rate"] <= 1
    assert out["right_entry_rate"] is None
    assert own["conditions"]["right"] != out["conditions"]["right"]


def test_a_memory_without_the_texts_documents_is_one_case(world: SmallWorld) -> None:
    def foreign() -> Iterator[TrainBatch]:
        for batch in two_batches(world):
            nowhere = torch.full_like(batch.positive_ids, -1)
            yield replace(batch, positive_ids=nowhere, positive_tokens=None)

    report = evaluation_report(world.model, world.memory, foreign, k=K)
    (case,) = report["cases"]
    assert case["right_entry_rate"] is None
    assert "holds no entry" in case["note"]


def test_the_lines_for_a_person_hold_every_number() -> None:
    conditions = {
        "right": {"loss": 1.25, "accuracy": 0.5, "masks": 40},
        "shuffled": {"loss": 3.5, "accuracy": 0.125, "masks": 40},
        "none": {"loss": 3.0, "accuracy": 0.25, "masks": 40},
    }
    few = {name: conditions[name] for name in ("right", "none")}
    lines = describe_evaluation(
        {
            "k": 5,
            "masks": 40,
            "cases": [
                {"name": "one", "right_entry_rate": 0.875, "conditions": conditions},
                {"name": "two", "right_entry_rate": None, "conditions": few},
            ],
        }
    )
    assert lines == [
        "Held-out text, 40 masked tokens, 5 entries per sequence:",
        "  one: masked-LM loss with the memory 1.250 (50.0% right), shuffled memory 3.500 (12.5% "
        "right), no memory 3.000 (25.0% right)",
        "    the right entry was among the top 5 for 87.5% of the sequences",
        "  two: masked-LM loss with the memory 1.250 (50.0% right), no memory 3.000 (25.0% right)",
    ]
