"""Search on CUDA gives the CPU's answers bit for bit, whatever the keys are held as."""

from itertools import pairwise

import pytest
import torch

from memory_server.index.base import IndexInput
from memory_server.index.flat_index import FlatIndex
from memory_server.keys.key_blocks import BlockedKeys, KeyBlock
from memory_server.keys.key_codes import KEY_DTYPES, KeyCodes, KeyDtype

pytestmark = pytest.mark.gpu


def index_of(keys, dtype: KeyDtype, device, *, docs, dead):
    """Two blocks of codes and a tail of exact keys; exact keys are looked up."""
    count, norm = len(keys), float(keys.norm(dim=1).max())
    parts = []
    for start, stop in pairwise([0, count // 3, count - 77]):
        codes = KeyCodes.empty(stop - start, keys.shape[1], dtype, device)
        for first in range(start, stop, 5_000):
            codes.put(first - start, keys[first : min(first + 5_000, stop)].to(device))
        parts.append((KeyBlock(codes=codes, largest_norm=norm, checksum=0), 0, stop - start))
    tail = KeyCodes(keys[count - 77 :].to(device))
    parts.append((KeyBlock(codes=tail, largest_norm=norm, checksum=0), 0, 77))
    return FlatIndex(
        IndexInput(
            keys=BlockedKeys(parts, keys.shape[1], device),
            ids_N=torch.arange(count, device=device) * 2,
            doc_ids_N=docs.to(device),
            dead_rows=dead.to(device),
            exact_keys=lambda rows: keys[torch.from_numpy(rows)],
        )
    )


@pytest.mark.parametrize("batch", [1, 33, 600])
@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_finds_what_the_cpu_finds(dtype, batch):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 128, generator=generator)
    nearest = torch.randint(60, (40_000,), generator=generator)
    keys = centres[nearest] + 0.5 * torch.randn(40_000, 128, generator=generator)
    queries = keys[:batch] + 0.3 * torch.randn(batch, 128, generator=generator)
    docs = torch.arange(40_000) // 4
    exclude = torch.where(torch.arange(batch) % 2 == 0, docs[:batch], -1)
    dead = torch.randint(0, 40_000, (300,), generator=generator).unique()
    expected = index_of(keys, "float32", torch.device("cpu"), docs=docs, dead=dead).search(
        queries, 5, exclude
    )
    hits = index_of(keys, dtype, torch.device("cuda"), docs=docs, dead=dead).search(
        queries.cuda(), 5, exclude.cuda(), exact=True
    )
    assert hits.exact
    assert torch.equal(hits.rows.cpu(), expected.rows)
    assert torch.equal(hits.scores.cpu(), expected.scores)


def test_equal_keys_go_to_the_lowest_ids():
    keys, docs = torch.ones(9_000, 16) * 0.3, torch.arange(9_000)
    none = torch.empty(0, dtype=torch.int64)
    index = index_of(keys, "float32", torch.device("cuda"), docs=docs, dead=none)
    hits = index.search(torch.ones(4, 16).cuda(), 3, None)
    assert hits.rows.tolist() == [[0, 1, 2]] * 4
