"""What the memory's benchmarks share: invented entries, a real key encoder, Ray, and a load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from memory_server.api import Memory
from memory_server.store.segments import write_segment
from memory_server.store.store import Store
from model import KeyEncoderFactory, PlugLMConfig, PlugLMForMaskedLM

VOCABULARY, ENTRY_TOKENS = 30_522, 64
SEGMENT_ROWS = 1 << 20
TOPIC_WORDS = 20


def invented_tokens(
    rows: int, *, seed: int, entry_tokens: int = ENTRY_TOKENS, topics: int = 0
) -> NDArray[Any]:
    """Token ids as frequent as words are (Zipf), uint16 [rows, S], entries of 16 to S tokens.

    With `topics`, half of an entry's tokens are from the twenty words of one of so many topics, so
    that keys lie in clusters, as a trained encoder's do; without, in a single cloud.
    """
    random = np.random.default_rng(seed)
    ranks = 1 + (VOCABULARY - 2) ** random.random((rows, entry_tokens), dtype=np.float32)
    tokens = np.minimum(ranks, VOCABULARY - 1).astype(np.uint16)
    if topics:
        topic_of = random.integers(0, topics, (rows, 1))
        word_of = random.integers(0, TOPIC_WORDS, tokens.shape)
        own = 1 + (topic_of * 7919 + word_of * 1_299_709) % (VOCABULARY - 1)  # spread by primes
        tokens = np.where(random.random(tokens.shape) < 0.5, own, tokens).astype(np.uint16)
    lengths = random.integers(min(16, entry_tokens), entry_tokens + 1, rows)
    tokens[np.arange(entry_tokens) >= lengths[:, None]] = 0
    return tokens


def invented_store(
    path: Path, entries: int, *, entry_tokens: int = ENTRY_TOKENS, topics: int = 0
) -> Store:
    """A store of invented entries, four to a document, in segments of about a million."""
    store = Store.create(
        path,
        tokenizer_fingerprint="none",
        entry_tokens=entry_tokens,
        vocab_size=VOCABULARY,
        pad_token_id=0,
    )
    files = []
    for first in range(0, entries, SEGMENT_ROWS):
        rows = min(SEGMENT_ROWS, entries - first)
        files.append(invented_segment(store, f"all-{first}", first, rows, topics=topics))
    store.commit(add_segments=files, message="invented", domain="first")
    return store


def invented_segment(store: Store, name: str, first_id: int, rows: int, *, topics: int = 0) -> Path:
    """A segment of new entries, ready to be committed."""
    path = store.incoming / f"{name}.arrow"
    ids, empty = np.arange(first_id, first_id + rows), [""] * rows
    write_segment(
        path,
        ids=ids,
        doc_ids=ids // 4,
        tokens_NS=invented_tokens(
            rows, seed=first_id, entry_tokens=store.meta.entry_tokens, topics=topics
        ),
        texts=empty,
        titles=empty,
        sources=empty,
        meta=store.meta,
    )
    return path


def key_encoder(hidden: int, *, seed: int = 0) -> tuple[KeyEncoderFactory, dict[str, Tensor]]:
    """The encoder of a model that was not trained, and its weights."""
    torch.manual_seed(seed)
    config = PlugLMConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_memory_layers=1,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        max_position_embeddings=512,
    )
    weights = PlugLMForMaskedLM(config).key_weights()
    return KeyEncoderFactory(config.to_dict()), weights


_CLUSTERS, _CLUSTERED_WIDTH, _SUMMED = 1000, 128, 16


def clustered_weights() -> dict[str, Tensor]:
    """What `ClusteredEncoder` reads: centres, and a random vector for every token."""
    random = torch.Generator().manual_seed(0)
    return {
        "centres": torch.randn(_CLUSTERS, _CLUSTERED_WIDTH, generator=random),
        "words": torch.randn(VOCABULARY, _CLUSTERED_WIDTH, generator=random),
    }


class ClusteredEncoder:
    """Keys around random centres, which a trained encoder's are like and an untrained one's not.

    The first tokens of an entry decide its centre, and their vectors its place around it, with half
    the deviation of the centres.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._centres, self._words = weights["centres"], weights["words"]

    def __call__(self, tokens_NS: Tensor) -> Tensor:
        """Keys, float32 [N, 128], of tokens, integers [N, S]."""
        first = tokens_NS[:, :_SUMMED].long()
        spread = torch.arange(1, _SUMMED + 1) * 7919
        centre = (first * spread).sum(dim=1) % len(self._centres)
        around = torch.nn.functional.embedding_bag(first, self._words, mode="sum")
        return self._centres[centre] + 0.5 * around / _SUMMED**0.5


def other_weights(weights: dict[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """The weights after some training, as far as a memory can tell."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.01 * tensor.abs().mean() * torch.randn(tensor.shape, generator=random)
        for name, tensor in weights.items()
    }


def queries_like(memory: Memory, count: int, *, seed: int = 0) -> Tensor:
    """Queries of the memory's key width, float32 [count, Q]."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, memory.info().key_width, generator=random)


def queries_near(keys: Tensor, count: int, seed: int) -> Tensor:
    """Keys [N, Q] with noise, of about a quarter of their own deviation: float32 [count, Q]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = keys[torch.randint(len(keys), (count,), generator=generator)]
    return chosen + 0.27 * keys[:4096].std() * torch.randn(chosen.shape, generator=generator)


@contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """Ray on this machine alone, with its processes at normal priority, as `pluglm` starts it."""
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        _node_ip_address="127.0.0.1",
        _system_config={"worker_niceness": 0},
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()


@dataclass
class Load:
    """Searches one after the other in a thread of its own, until it is stopped.

    Attributes:
        seconds: of each search; epochs: that answered; failures: whatever was raised.
        belong_together: tells of a reply's ids whether one content can hold them all.
        mixed: replies of an epoch that was left, of some shards only, or of two contents.
    """

    memory: Memory
    queries_BQ: Tensor
    top_k: int = 5
    pause_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    belong_together: Callable[[Tensor], bool] | None = None
    mixed: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def percentile(self, share: float) -> float:
        """Of the searches' seconds."""
        return float(np.quantile(self.seconds, share))

    def _run(self) -> None:
        newest = 0
        while not self._stop.is_set():
            began = time.perf_counter()
            try:
                reply = self.memory.search(self.queries_BQ, self.top_k)
            except Exception as error:  # what is counted is that none is raised
                self.failures.append(error)
                continue
            self.seconds.append(time.perf_counter() - began)
            self.epochs.append(reply.epoch)
            # An epoch that was left must not answer again.
            alone = self.belong_together is None or self.belong_together(reply.ids)
            self.mixed += reply.epoch < newest or bool(reply.missing_shards) or not alone
            newest = max(newest, reply.epoch)
            self._stop.wait(self.pause_s)
