"""The whole system in several processes, for `simulation_check.py`: clients, and trainers.

Each process attaches to the memory by its name, as others than its starter do.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import ray
import torch
from served import ENTRY_TOKENS, key_encoder, queries_like
from simulation_parts import TOP_K
from training_overhead import VOCABULARY, make_batch, model_settings
from weak_scaling import Waiting

from memory_server.actors.client import RayMemory
from memory_server.api import Memory
from memory_server.local import LocalMemory
from memory_server.store.store import Store
from trainer.build import build_model, model_config
from trainer.engine import TrainingEngine, start_process_group, stop_process_group
from trainer.searching import MemoryLookup
from trainer.settings import DataSettings, OptimSettings, RuntimeSettings, TrainSettings

NAME, TIMEOUT_S, WARMUP = "simulation-check", 600.0, 5


def client(number: int, address: str, batch: int, rounds: int, go: Any, pipe: Any) -> None:
    """A process that asks once a round, when all are ready."""
    torch.set_num_threads(1)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    memory = RayMemory.attach(NAME)
    queries = queries_like(memory, batch, seed=number)
    told = []
    for _ in range(WARMUP + rounds):
        go.wait(TIMEOUT_S)
        began = time.perf_counter()
        memory.search(queries, TOP_K)
        told.append((began, time.perf_counter() - began))
    pipe.send(told[WARMUP:])
    memory.close()
    ray.shutdown()


def asked(clients: int, batch: int, rounds: int, address: str) -> tuple[Any, Any]:
    """(seconds of searches [clients, rounds], how much later than the first each was begun)."""
    told = np.array(_run(client, clients, (address, batch, rounds)))
    return told[:, :, 1], told[:, :, 0] - told[:, :, 0].min(0)


def trainer(
    rank: int, ranks: int, meeting: str, address: str, args: argparse.Namespace, go: Any, pipe: Any
) -> None:
    """A rank that trains; without an address its memory is in its own process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    start_process_group("cpu", rank=rank, world_size=ranks, init_method=meeting)
    settings = TrainSettings(
        data=DataSettings(corpus="none"),
        model=model_settings("small"),
        optim=OptimSettings(batch_size=args.train_batch * ranks, steps=WARMUP + args.steps),
        runtime=RuntimeSettings(trainers=ranks, zero_stage=2, precision="fp32", device="cpu"),
    )
    config = model_config(settings.model, vocab_size=VOCABULARY, pad_token_id=0)
    model = build_model(config, seed=0)
    memory: Memory
    if address:
        memory = RayMemory.attach(NAME)
    else:
        encoder, weights = key_encoder(args.hidden)
        memory = LocalMemory(Store.open(args.small_store), encoder=encoder, weights=weights)
    pool, engine = ThreadPoolExecutor(1), TrainingEngine(model, settings, "cpu")
    engine.train()
    generator = torch.Generator().manual_seed(rank)
    entries = torch.randint(1, VOCABULARY, (64, ENTRY_TOKENS), generator=generator)
    epoch, told = memory.info().epoch, []
    go.wait(TIMEOUT_S)
    for _ in range(WARMUP + args.steps):
        batch, waiting = make_batch(args.train_batch, entries, generator), Waiting()
        began = time.perf_counter()
        engine.forward_backward(
            input_ids=batch.input_ids,
            attention_mask=torch.ones_like(batch.input_ids),
            labels=batch.labels,
            lookup=MemoryLookup(
                memory,
                k=TOP_K,
                epoch=epoch,
                exclude_doc_ids=None,
                pool=pool,
                waiting=lambda waiting=waiting: waiting,
                note=lambda found: None,
            ),
        )
        engine.step()
        told.append((time.perf_counter() - began, waiting.seconds))
    pipe.send(told[WARMUP:])
    pool.shutdown()
    memory.close()
    stop_process_group()


def trained(ranks: int, address: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """(seconds of steps [ranks, steps], of them waiting for the memory)."""
    with tempfile.TemporaryDirectory() as meeting:
        extra = (ranks, f"file://{meeting}/meeting", address, args)
        told = np.array(_run(trainer, ranks, extra))
    return told[:, :, 0], told[:, :, 1]


def _run(call: Any, processes: int, extra: tuple[Any, ...]) -> list[Any]:
    """What as many processes of one kind tell."""
    context = get_context("spawn")
    go, pipes, started = context.Barrier(processes), [], []
    for number in range(processes):
        reader, writer = context.Pipe(duplex=False)
        started.append(context.Process(target=call, args=(number, *extra, go, writer)))
        started[-1].start()
        writer.close()
        pipes.append(reader)
    try:
        told = [pipe.recv() for pipe in pipes]
    except EOFError:
        for process in started:
            process.kill()
        raise RuntimeError("a process died; its error is above") from None
    for process in started:
        process.join()
    return told
