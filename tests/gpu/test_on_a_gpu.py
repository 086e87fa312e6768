"""The same code on CUDA gives the CPU's answers. Skipped where there is no GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memory_server.local import LocalMemory
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM
from trainer.data.stream import TrainBatch
from trainer.engine import TrainingEngine, start_process_group, stop_process_group
from trainer.parameter_files import write_index
from trainer.settings import DataSettings, OptimSettings, RuntimeSettings, TrainSettings

pytestmark = pytest.mark.gpu

CONFIG = PlugLMConfig(
    vocab_size=200,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=32,
    key_size=16,
    memory_ffn_size=32,
    value_pooling="tokens",
    query_norm="layer",
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.create(
        tmp_path / "store",
        tokenizer_fingerprint="test",
        entry_tokens=12,
        vocab_size=200,
        pad_token_id=0,
    )
    rng = np.random.default_rng(0)
    path = store.incoming / "entries.arrow"
    write_segment(
        path,
        ids=np.arange(500),
        doc_ids=np.arange(500) // 2,
        tokens_NS=rng.integers(1, 200, (500, 12)),
        texts=[""] * 500,
        titles=[""] * 500,
        sources=["test"] * 500,
        meta=store.meta,
    )
    store.commit(add_segments=[path], message="entries")
    return store


def memory_on(device: str, store: Store, model: PlugLMForMaskedLM) -> LocalMemory:
    weights = model.key_weights()
    factory = KeyEncoderFactory(CONFIG.to_dict(), device=device)
    return LocalMemory(store, encoder=factory, weights=weights, device=device)


def test_search_on_the_gpu_finds_the_same_entries(store: Store) -> None:
    torch.manual_seed(0)
    model = PlugLMForMaskedLM(CONFIG)
    queries = torch.randn(64, CONFIG.key_size)
    exclude = torch.arange(64)
    with memory_on("cpu", store, model) as cpu, memory_on("cuda", store, model) as gpu:
        expected = cpu.search(queries, 5, exclude_doc_ids=exclude)
        found = gpu.search(queries.cuda(), 5, exclude_doc_ids=exclude.cuda())
    assert found.ids.is_cuda
    torch.testing.assert_close(found.scores.cpu(), expected.scores, rtol=1e-4, atol=1e-5)
    assert float((found.ids.cpu() == expected.ids).float().mean()) > 0.99


def test_a_forward_pass_on_the_gpu_equals_the_cpu(store: Store) -> None:
    torch.manual_seed(0)
    model = PlugLMForMaskedLM(CONFIG).eval()
    ids = torch.randint(5, 200, (8, 20))
    labels = torch.where(torch.rand(8, 20) < 0.2, ids, -100)
    with memory_on("cpu", store, model) as memory:

        def lookup(queries_BQ: torch.Tensor) -> object:
            return memory.search(queries_BQ, 5)

        expected = model(ids, labels=labels, lookup=lookup)
        on_gpu = model.cuda()(ids.cuda(), labels=labels.cuda(), lookup=lookup)
    torch.testing.assert_close(on_gpu.loss.cpu(), expected.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "variant",
    [
        {"value_pooling": "tokens", "query_norm": "layer"},
        {"value_pooling": "shared", "query_norm": "batch"},
        {"entry_encoder": "first_n", "entry_encoder_layers": 2, "entry_pooler": "mean"},
    ],
    ids=str,
)
def test_gradients_with_padding_and_double_entries_equal_the_cpus(
    store: Store, variant: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = PlugLMConfig.from_dict(CONFIG.to_dict() | variant)
    model = PlugLMForMaskedLM(config).train()
    on_gpu = copy.deepcopy(model).cuda()
    mask = (torch.arange(20) < torch.randint(3, 21, (8, 1))).long()
    ids = torch.randint(5, 200, (8, 20)) * mask
    labels = torch.where((torch.rand(8, 20) < 0.3) & (mask > 0), ids, -100)
    encoder = KeyEncoderFactory(config.to_dict())
    with LocalMemory(store, encoder=encoder, weights=model.key_weights()) as memory:
        found = memory.search(torch.randn(1, config.key_size).expand(8, -1), 5)
        model.attach(lambda _: found)
        on_gpu.attach(lambda _: found)
        expected, given = (
            model(ids, mask, labels=labels),
            on_gpu(ids.cuda(), mask.cuda(), labels=labels.cuda()),
        )
    torch.testing.assert_close(given.loss.cpu(), expected.loss, rtol=1e-4, atol=1e-5)
    expected.loss.backward()
    given.loss.backward()
    ours = dict(on_gpu.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = ours[name].grad
            assert grad is not None, name
            torch.testing.assert_close(grad.cpu(), parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_autocast_searches_in_float32_and_trains(store: Store) -> None:
    torch.manual_seed(0)
    model = PlugLMForMaskedLM(CONFIG).cuda().train()
    asked: list[torch.dtype] = []
    ids = torch.randint(5, 200, (8, 20), device="cuda")
    with memory_on("cuda", store, model) as memory:

        def lookup(queries_BQ: torch.Tensor) -> object:
            asked.append(queries_BQ.dtype)
            return memory.search(queries_BQ, 5)

        with torch.autocast("cuda", torch.bfloat16):
            output = model(ids, labels=ids, lookup=lookup)
    assert asked == [torch.float32]
    assert output.loss.dtype == torch.float32
    assert output.retrievals[0].key_BKQ.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all cases: DeepSpeed keeps the first one of a process."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    start_process_group("cuda", rank=0, world_size=1, init_method=f"file://{meeting}")
    yield
    stop_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("zero_stage", "options"),
    [
        (2, {}),
        (2, {"fused": False}),
        (2, {"precision": "bf16"}),
        (3, {"precision": "bf16"}),
        (0, {"precision": "fp16"}),
        (1, {"precision": "bf16", "optimizer": "lamb"}),
        (3, {"precision": "bf16", "optimizer": "lamb"}),
        (2, {"offload_optimizer": "cpu"}),
        (3, {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
        (3, {"activation_checkpointing": True}),
    ],
    ids=str,
)
def test_the_engine_trains_on_the_gpu(
    store: Store, tmp_path: Path, zero_stage: int, options: dict[str, Any]
) -> None:
    of_optim = {key: options[key] for key in ("optimizer", "fused") if key in options}
    # A step of LAMB is a share of the weights' own size.
    rate = 0.1 if "optimizer" in options else 1e-2
    of_runtime = {key: value for key, value in options.items() if key not in of_optim}
    settings = TrainSettings(
        data=DataSettings(corpus="unused"),
        optim=OptimSettings(steps=30, batch_size=8, lr=rate, warmup_ratio=0.0, **of_optim),
        runtime=RuntimeSettings(trainers=1, zero_stage=zero_stage, **of_runtime),
    )
    torch.manual_seed(0)
    model = PlugLMForMaskedLM(CONFIG)
    memory = memory_on("cuda", store, model)
    engine = TrainingEngine(model, settings, "cuda")
    ids = torch.randint(5, 200, (8, 20), device="cuda")
    batch = TrainBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids,
        doc_ids=torch.arange(8, device="cuda"),
        positive_tokens=None,
        positive_ids=torch.full((8,), -1, device="cuda"),
    )
    losses = []
    for _ in range(settings.optim.steps):
        output = engine.forward_backward(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            lookup=lambda q: memory.search(q, 5),
        )
        engine.step()
        losses.append(float(output.loss))
    assert losses[-1] < losses[0] - 1.0
    before = {name: weight.clone() for name, weight in engine.key_weights().items()}
    write_index(tmp_path, [engine.save(tmp_path)])
    again = TrainingEngine(PlugLMForMaskedLM(CONFIG), settings, "cuda")
    again.load(tmp_path, engine.counters())
    for name, weight in again.key_weights().items():
        assert torch.equal(weight, before[name]), name
    assert again.counters() == engine.counters()
    assert set(engine.key_weights()) == set(PlugLMForMaskedLM(CONFIG).key_weights())
    memory.close()
