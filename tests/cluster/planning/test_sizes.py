"""Bytes by part are those that the code really holds and writes."""

from pathlib import Path

import pytest
import torch

from cluster.planning import sizes
from cluster.planning.measure_memory import EncodedWorld, World, invented_store, make_world
from memory_server.index.base import IndexSettings
from memory_server.index.factory import build_index
from memory_server.keys.key_codes import KEY_DTYPES, KeyCodes
from memory_server.local import LocalMemory
from model import PlugLMForMaskedLM
from trainer.build import count_parameters

CPU = torch.device("cpu")


def world_of(entries: int, *, width: int = 24, vocabulary: int = 300) -> World:
    return make_world(
        CPU, entries=entries, hidden=16, tokens=12, width=width, vocabulary=vocabulary
    )


@pytest.mark.parametrize("dtype", KEY_DTYPES)
def test_keys_are_as_large_as_their_codes(dtype: str) -> None:
    codes = KeyCodes.empty(1_003, 40, dtype, CPU)
    assert sizes.keys(1_003, 40, dtype).device == codes.nbytes


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_memorys_parts_are_those_of_its_receipt(dtype: str, tmp_path: Path) -> None:
    world = world_of(5_000)
    store = invented_store(tmp_path / "store", world)
    with LocalMemory(
        store,
        encoder=world.factory,
        weights=world.weights,
        index=IndexSettings(key_dtype=dtype),
    ) as memory:
        held = memory.info().bytes
    assert sizes.keys(5_000, 24, dtype).device == held["keys"]
    assert sizes.tokens(5_000, 12, 300) == held["tokens"]
    marks = sizes.rows_on_device(5_000, on_gpu=False, approximate=False).device
    assert marks == pytest.approx(held["index"], abs=16)
    assert sizes.rows_on_host(5_000).host == held["ids"] + 5_000


def test_a_store_on_disk_is_as_large_as_told(tmp_path: Path) -> None:
    world = world_of(5_000)
    invented_store(tmp_path / "store", world)
    written = sum(f.stat().st_size for f in (tmp_path / "store").rglob("*") if f.is_file())
    assert sizes.store(5_000, 12, 300, text_bytes=0) == pytest.approx(written, rel=0.02)


def test_wide_vocabularies_take_four_bytes_a_token() -> None:
    assert sizes.tokens(10, 64, 1 << 16) == 10 * 64 * 2
    assert sizes.tokens(10, 64, (1 << 16) + 1) == 10 * 64 * 4


def test_tables_are_as_large_as_those_that_are_built() -> None:
    world = world_of(10)
    tables = world.factory.tables(world.weights, CPU, entry_tokens=12)
    assert tables is not None
    built = sum(t.nbytes for t in tables.values() if t.ndim)
    assert sizes.tables(world.config, 12) == built


def test_the_weights_that_are_published_are_those_of_the_keys() -> None:
    world = world_of(10)
    weights = sum(weight.nbytes for weight in world.weights.values())
    assert sizes.key_weights(world.config) == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("kind", ["ivf", "pq"])
def test_an_approximate_index_is_as_large_as_it_says(kind: str) -> None:
    pytest.importorskip("faiss")
    rows = 30_000
    encoded = EncodedWorld(world_of(rows, width=32), CPU)
    settings = IndexSettings(kind=kind)
    index = build_index(settings, encoded.rows(rows, "float32"))
    told = sizes.codes(rows, 32, settings, on_gpu=False)
    beside = sizes.rows_on_device(rows, on_gpu=False, approximate=True)
    assert told.device + beside.device == pytest.approx(index.bytes, rel=0.1)


def test_a_gpu_holds_copies_of_ids_and_documents_for_each_epoch() -> None:
    on_gpu = sizes.rows_on_device(64, on_gpu=True, approximate=False)
    on_cpu = sizes.rows_on_device(64, on_gpu=False, approximate=False)
    assert on_gpu.device - on_cpu.device == 64 * 16


def test_the_trainers_state_is_dealt_out_by_the_zero_stage() -> None:
    def state(stage: int, precision: str = "bf16") -> int:
        return sizes.trainer_state(1_000, zero_stage=stage, precision=precision, trainers=4).device

    assert [state(stage) for stage in range(4)] == [16_000, 7_000, 5_500, 4_000]
    # Stage 0 in float32 is AdamW's own: weights, gradients, two moments.
    model = PlugLMForMaskedLM(world_of(10).config)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = sum(2 * p.nbytes for p in model.parameters())
    held += sum(
        value.nbytes
        for state_of in optimizer.state.values()
        for value in state_of.values()
        if torch.is_tensor(value) and value.ndim
    )
    parameters = count_parameters(model.config)
    told = sizes.trainer_state(parameters, zero_stage=0, precision="fp32", trainers=8)
    assert told.device == held
