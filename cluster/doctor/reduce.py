"""An all-reduce between processes of this node, as trainers will do it. Ends by itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import socket
import time
from datetime import timedelta
from typing import Any

from cluster.doctor.findings import Finding

NUMBERS = 1 << 20
_FIX = {
    "gloo": "let processes of this node connect to each other (firewall, GLOO_SOCKET_IFNAME)",
    "nccl": "see NCCL_DEBUG=INFO; check the drivers, NCCL_SOCKET_IFNAME and GPU peer access",
}


def all_reduce(backend: str, *, loopback: bool = True, timeout_s: float = 120.0) -> Finding:
    """Have two processes add a vector of 4 MiB up.

    Args:
        backend: "gloo", or "nccl" where there are two GPUs.
        loopback: meet on 127.0.0.1; else at the address of this node's name.
    """
    with socket.socket() as probe:
        host = "127.0.0.1" if loopback else socket.gethostbyname(socket.gethostname())
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    arguments = (f"tcp://{host}:{port}", backend, timeout_s, told)
    ranks = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + timeout_s
    for rank in ranks:
        rank.join(max(0.0, deadline - time.monotonic()))
    hung = [rank for rank in ranks if rank.is_alive()]
    for rank in hung:
        rank.kill()
        rank.join()
    answers: list[float | str] = []
    with contextlib.suppress(queue.Empty):  # one may have died without a word
        while not hung and len(answers) < 2:
            answers.append(told.get(timeout=5.0))
    wrong = next((a for a in answers if isinstance(a, str)), "")
    if len(answers) == 2 and not wrong:
        took = f"{max(answers) * 1000:.0f} ms"
        return Finding(grade="ok", what=f"{backend} adds up {NUMBERS >> 18} MiB in {took}")
    reason = wrong or (f"it did not end within {timeout_s:g} s" if hung else "a process died")
    return Finding(
        grade="problem", what=f"{backend} between two processes failed: {reason}", fix=_FIX[backend]
    )


def _rank(rank: int, init_method: str, backend: str, timeout_s: float, told: Any) -> None:
    try:
        told.put(reduce_once(rank, 2, init_method, backend, timeout_s, device=rank))
    # Whatever it is, it is what the person wants to know.
    except Exception as error:
        told.put(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def reduce_once(
    rank: int, world: int, init_method: str, backend: str, timeout_s: float, device: int = 0
) -> float:
    """Meet, and add a vector up as one of the ranks; seconds of the second time, the first of which
    also makes the connections.

    Args:
        device: number of the GPU, for "nccl".

    Raises:
        RuntimeError: they did not meet, or the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )
    where = torch.device("cuda", device) if backend == "nccl" else torch.device("cpu")
    numbers = torch.full((NUMBERS,), float(rank + 1), device=where)
    dist.all_reduce(numbers)
    numbers.fill_(float(rank + 1))
    began = time.perf_counter()
    dist.all_reduce(numbers)
    right = bool((numbers == world * (world + 1) // 2).all())
    seconds = time.perf_counter() - began
    dist.destroy_process_group()
    if not right:
        raise RuntimeError("the sum is wrong")
    return seconds
