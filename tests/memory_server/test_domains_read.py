"""A memory that reads some domains answers as one that has only those."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memory_server.errors import UnknownDomain, UnknownEntry
from memory_server.keys.stored_vectors import StoredVectors
from memory_server.local import LocalMemory
from memory_server.store.segments import write_segment
from memory_server.store.store import Store

S, Q, VOCAB, PER_DOMAIN = 6, 8, 50, 40
DOMAINS = ("default", "biomed", "law")


def encoder_of(weights: Any) -> Any:
    def encode(tokens_NS: Tensor) -> Tensor:
        return weights["table"][tokens_NS.long()].mean(1)

    return encode


WEIGHTS = {"table": torch.randn(VOCAB, Q, generator=torch.Generator().manual_seed(3))}


def add(store: Store, domain: str, first_id: int) -> None:
    rng = np.random.default_rng(first_id)
    path = store.incoming / f"{domain}.arrow"
    ids = np.arange(first_id, first_id + PER_DOMAIN)
    write_segment(
        path,
        ids=ids,
        doc_ids=ids // 2,
        tokens_NS=rng.integers(1, VOCAB, (PER_DOMAIN, S)),
        texts=[f"{domain} {i}" for i in ids],
        titles=[""] * PER_DOMAIN,
        sources=[domain] * PER_DOMAIN,
        meta=store.meta,
    )
    store.commit(add_segments=[path], domain=domain, message=domain)


def make(path: Path, domains: tuple[str, ...]) -> Store:
    store = Store.create(
        path, tokenizer_fingerprint="f" * 32, entry_tokens=S, vocab_size=VOCAB, pad_token_id=0
    )
    for name in domains:
        add(store, name, 100 * DOMAINS.index(name))
    return store


@pytest.mark.parametrize("chosen", [("biomed",), ("law", "default"), DOMAINS])
def test_chosen_domains_are_a_memory_of_only_those(tmp_path: Path, chosen: tuple[str, ...]) -> None:
    whole, only = make(tmp_path / "whole", DOMAINS), make(tmp_path / "only", chosen)
    whole.commit(remove_ids=[3, 105, 203], message="some rows are gone")
    gone = [i for i, name in ((3, "default"), (105, "biomed"), (203, "law")) if name in chosen]
    only.commit(remove_ids=gone, message="the same rows")
    head = whole.head()
    queries = torch.randn(16, Q, generator=torch.Generator().manual_seed(1))
    exclude = torch.arange(16) * 7
    with (
        LocalMemory(whole, encoder=encoder_of, weights=WEIGHTS, domains=chosen) as some,
        LocalMemory(only, encoder=encoder_of, weights=WEIGHTS) as plain,
    ):
        assert some.info().entries == plain.info().entries == len(chosen) * (PER_DOMAIN - 1)
        for excluded in (None, exclude):
            mine = some.search(queries, 9, exclude_doc_ids=excluded)
            theirs = plain.search(queries, 9, exclude_doc_ids=excluded)
            assert torch.equal(mine.ids, theirs.ids)
            assert torch.equal(mine.tokens, theirs.tokens)
            torch.testing.assert_close(mine.scores, theirs.scores)
        if "default" not in chosen:
            with pytest.raises(UnknownEntry):
                some.entries([5])
    assert whole.head() == head


def test_an_edit_of_the_content_is_seen_through_the_same_domains(tmp_path: Path) -> None:
    store = make(tmp_path / "store", ("default", "biomed"))
    with LocalMemory(store, encoder=encoder_of, weights=WEIGHTS, domains=["biomed"]) as memory:
        add(store, "law", 200)
        store.commit(remove_ids=[100], message="one of biomed goes")
        epoch = memory.stage(encoder_step=0, content_version=store.head())
        memory.wait_sealed(epoch, 30.0)
        memory.activate(epoch)
        assert memory.info().entries == PER_DOMAIN - 1
        found = memory.search(torch.randn(4, Q), PER_DOMAIN)
        assert set(found.ids.flatten().tolist()) == {-1, *range(101, 100 + PER_DOMAIN)}
        without = store.unplug("biomed")
        with pytest.raises(UnknownDomain, match=r"has no domain 'biomed'; it has default, law"):
            memory.stage(encoder_step=0, content_version=without)
        assert memory.info().entries == PER_DOMAIN - 1


def test_stored_vectors_of_all_serve_some_domains(tmp_path: Path) -> None:
    store = make(tmp_path / "store", DOMAINS)
    ids = np.concatenate([np.arange(PER_DOMAIN) + 100 * n for n in range(3)])
    keys = np.random.default_rng(0).standard_normal((len(ids), Q)).astype(np.float32)
    vectors = StoredVectors.write(tmp_path / "vectors", ids, keys)
    with LocalMemory(store, vectors=vectors, domains=["law"]) as memory:
        found = memory.search(torch.from_numpy(keys[:5].copy()), 3)
        assert bool((found.ids >= 200).all())


def test_an_unknown_domain_is_refused_and_the_known_are_named(tmp_path: Path) -> None:
    store = make(tmp_path / "store", ("default", "law"))
    with pytest.raises(UnknownDomain, match=r"no domain 'bio', 'x'; it has default, law"):
        LocalMemory(store, encoder=encoder_of, weights=WEIGHTS, domains=["bio", "law", "x"])
