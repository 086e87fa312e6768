"""Run a function on several gloo ranks, each a fresh process, and bring back what they return."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

Job = Callable[..., Any]


class RankFailedError(RuntimeError):
    """A rank raised or died; the message holds its traceback or exit code."""


def run_ranks(
    function: Job, ranks: int, *args: Any, timeout_s: float = 120.0, process_group: bool = True
) -> list[Any]:
    """Call `function(rank, *args)` on every rank and return the results in rank order.

    Blocks. RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as launchers do, one
    thread per rank. Processes that are still running at the end are ended; no other ones.

    Args:
        function: a module's top-level function (it is pickled by name).
        ranks: how many processes.
        args: picklable; tensors on the CPU.
        timeout_s: for all of it, the start of the processes included, and for each collective.
        process_group: initialise torch.distributed over gloo; False leaves it to the function.

    Raises:
        RankFailedError: a rank raised or died; the first one is told, the others are ended.
        TimeoutError: not all ranks were done in time; names those that were not.
    """
    context = multiprocessing.get_context("spawn")
    port, payload = _free_port(), _packed(args)
    processes, readers = [], {}
    for rank in range(ranks):
        reader, writer = context.Pipe(duplex=False)
        settings = (rank, ranks, port, timeout_s, process_group)
        process = context.Process(target=_main, args=(function, payload, settings, writer))
        process.start()
        writer.close()
        processes.append(process)
        readers[reader] = rank
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(results) < ranks:
            pending = [reader for reader, rank in readers.items() if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(set(range(ranks)) - set(results))
                raise TimeoutError(f"ranks {late} of {ranks} were not done within {timeout_s:g} s")
            for reader in ready:
                assert isinstance(reader, Connection)
                rank = readers[reader]
                results[rank] = _receive(reader, rank, processes[rank])
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
        return [results[rank] for rank in range(ranks)]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for reader in readers:
            reader.close()


def _receive(reader: Connection, rank: int, process: Any) -> Any:
    try:
        kind, content = reader.recv()
    except EOFError:
        process.join(5)
        raise RankFailedError(f"rank {rank} died with exit code {process.exitcode}") from None
    if kind == "error":
        raise RankFailedError(f"rank {rank} raised:\n{content}")
    return _unpacked(content)


def _main(
    function: Job,
    payload: bytes,
    settings: tuple[int, int, int, float, bool],
    writer: Connection,
) -> None:
    rank, ranks, port, timeout_s, process_group = settings
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    try:
        if process_group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        content = _packed(function(rank, *_unpacked(payload)))
        if process_group:
            # Nobody leaves while another still talks to it.
            dist.barrier()
            dist.destroy_process_group()
        writer.send(("result", content))
    except BaseException:
        writer.send(("error", traceback.format_exc()))
    finally:
        writer.close()


def _packed(value: Any) -> bytes:
    """Bytes, because a tensor sent as such lives in shared memory that ends with its process."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
