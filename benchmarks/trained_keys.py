"""Keys and queries of a trained model, as search_faiss.py takes them: what real ones look like.

Keys are those that a memory gets from the run's weights, of all entries of a corpus, in the order
of its rows; queries are what the model's last memory layer asks for on held-out sequences of that
corpus, masked as the run's evaluation masks, with that memory attached. The corpus must have the
model's tokenizer:

  pluglm quickstart
  pluglm corpus build TEXTS --out big --tokenizer MODEL --sequence-length 65
  python benchmarks/trained_keys.py runs/quickstart/run-seed0 big --out big-keys
  python benchmarks/search_faiss.py --keys big-keys/keys.npy --queries big-keys/queries.npy

MODEL is runs/quickstart/run-seed0/model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from harness import argument_parser, begin, finish, note, positive, table
from torch import Tensor

from cluster.config import load_config
from cluster.trained_model import TrainedModel, load_trained_model
from memory_server.api import Retrieved
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from model import KeyEncoderFactory
from trainer.task import CorpusTask

ROWS = 1 << 14


def write_keys(path: Path, trained: TrainedModel, store: Store) -> int:
    """Keys of all entries, float32 [N, Q], by tables as a refresh of a large memory; how many."""
    factory = KeyEncoderFactory(trained.model.config.to_dict())
    weights = trained.model.key_weights()
    tables = factory.tables(weights, "cpu", entry_tokens=store.meta.entry_tokens)
    encoder = factory(weights) if tables is None else factory.from_tables(tables)
    refs = store.manifest().segments
    total = sum(ref.rows for ref in refs)
    keys = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(total, trained.model.config.key_size)
    )
    done = 0
    for ref in refs:
        segment = store.segment(ref)
        for start in range(0, segment.rows, ROWS):
            tokens = segment.tokens[start : start + ROWS].astype(np.int32)
            with torch.no_grad():
                keys[done : done + len(tokens)] = encoder(torch.from_numpy(tokens)).numpy()
            done += len(tokens)
    keys.flush()
    return total


@torch.no_grad()
def write_queries(
    path: Path, trained: TrainedModel, memory: LocalMemory, run: Path, corpus: Path, count: int
) -> int:
    """What the last memory layer asks for, float32 [n, Q], n at most `count`; how many."""
    config = load_config(
        run / "config.toml", [f"data.corpus={corpus}", f"evaluate.sequences={count}"]
    )
    asked: list[Tensor] = []

    def lookup(queries_BQ: Tensor) -> Retrieved:
        asked.append(queries_BQ.float())
        return memory.search(queries_BQ, config.memory.top_k)

    queries = []
    for batch in CorpusTask(corpus, corpus / "memory").heldout(config):
        trained.model(batch.input_ids, batch.attention_mask, lookup=lookup)
        queries.append(asked[-1])  # memory layers before it ask for themselves
    np.save(path, torch.cat(queries).numpy())
    return sum(map(len, queries))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("corpus", type=Path, help="made by `pluglm corpus build`")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--queries", type=positive, default=4096, help="at most")
    args = parser.parse_args()
    facts = begin()
    trained = load_trained_model(args.run / "model")
    store = Store.open(args.corpus / "memory")
    trained.check_fits(store)
    args.out.mkdir(parents=True)
    keys = write_keys(args.out / "keys.npy", trained, store)
    note(f"{keys:,} keys: {args.out / 'keys.npy'}")
    with trained.memory(store.location) as memory:
        queries = write_queries(
            args.out / "queries.npy", trained, memory, args.run, args.corpus, args.queries
        )
    print(table(["keys", "queries", "in"], [[f"{keys:,}", f"{queries:,}", str(args.out)]]))
    finish(args.json, facts, args, [{"keys": keys, "queries": queries}])


if __name__ == "__main__":
    main()
