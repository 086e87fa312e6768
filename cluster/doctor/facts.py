"""What one node says of itself. Runs on every node, as a Ray task or in this process."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch", "deepspeed", "ray", "pyarrow", "transformers", "tokenizers", "safetensors", "numpy",
    "pyzmq",
)  # fmt: skip
FAISS = ("faiss-cpu", "faiss-gpu-cu12")
_RAY_RAISES_TO = 65_536
_ENDLESS = 1 << 31


@dataclass(frozen=True, kw_only=True)
class PathFacts:
    """A path as a node sees it.

    Attributes:
        path: that was asked for. exists, writable: here.
        free_bytes: of its filesystem, or of the nearest directory above that exists.
        token: what stands in the file of this name there that another node wrote; None: no file.
    """

    path: str
    exists: bool
    writable: bool
    free_bytes: int
    token: str | None = None


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """A node.

    Attributes:
        versions: of packages; "" where one is not installed.
        gpus: names of the GPUs that torch sees here.
        cpus: that this process may use. ram_bytes: of the machine, or of its container.
        shm_bytes: free in /dev/shm; -1 where there is none.
        open_files: files and sockets that a process may have open.
        clock: of `time.time`, when it answered.
        paths: that were asked for.
    """

    host: str
    node_id: str
    python: str
    versions: dict[str, str]
    gpus: tuple[str, ...]
    cpus: int
    ram_bytes: int
    shm_bytes: int
    open_files: int
    clock: float
    paths: tuple[PathFacts, ...] = field(default=())


def read_facts(paths: Sequence[str] = (), *, token_name: str = "", node_id: str = "") -> NodeFacts:
    """Look around on this node; writes nothing.

    Args:
        paths: directories that the run uses.
        token_name: of a file in them that another node may have written.
        node_id: Ray's, whose task this is; empty: no Ray runs yet.
    """
    import psutil
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shm = Path("/dev/shm")
    return NodeFacts(
        host=socket.gethostname(),
        node_id=node_id,
        python=platform.python_version(),
        versions={name: _version(name) for name in (*PACKAGES, *FAISS)},
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(seen)),
        cpus=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        ram_bytes=int(psutil.virtual_memory().total),
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else -1,
        open_files=_open_files(in_ray=bool(node_id)),
        clock=time.time(),
        paths=tuple(_path_facts(path, token_name) for path in paths),
    )


def _open_files(*, in_ray: bool) -> int:
    """The limit of this process. A Ray that a run starts for itself raises it, `ray start` does
    not."""
    soft, hard = (
        _ENDLESS if limit == resource.RLIM_INFINITY else min(limit, _ENDLESS)
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft if in_ray else max(soft, min(hard, _RAY_RAISES_TO))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _path_facts(path: str, token_name: str) -> PathFacts:
    directory = Path(path)
    above = next(p for p in (directory, *directory.parents) if p.exists())
    token: str | None = None
    if token_name:
        try:
            token = (directory / token_name).read_text(encoding="ascii")
        except OSError:
            token = None
    return PathFacts(
        path=path,
        exists=directory.is_dir(),
        writable=os.access(above, os.W_OK),
        free_bytes=shutil.disk_usage(above).free,
        token=token,
    )
