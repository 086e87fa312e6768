"""How much memory is left for keys, before they are made."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from memory_server.errors import NotEnoughMemory

_CGROUP_LIMIT = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
RESERVE = 0.05  # of what is free is left alone: the estimate is of the keys, not of every byte


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What staging an epoch would take on one shard, in bytes.

    Attributes:
        own: for its keys and index; 0 as long as the key width is not known.
        tables: for key tables, which on a CPU a node's shards share.
        free: what may still be taken here.
    """

    own: int
    tables: int
    free: int


def free_bytes(device: torch.device) -> int:
    """What may still be allocated on the device: of the machine, or of its container if less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * (1 - RESERVE))
    free = psutil.virtual_memory().available
    for limit_file, usage_file in _CGROUP_LIMIT:
        limit, usage = _number(limit_file), _number(usage_file)
        if limit is not None and usage is not None:
            free = min(free, max(0, limit - usage))
    return int(free * (1 - RESERVE))


def check_fits(needed: int, free: int, *, what: str) -> None:
    """Refuse what would not fit.

    Raises:
        NotEnoughMemory: says what is needed and what is free.
    """
    if needed > free:
        raise NotEnoughMemory(
            f"{what} needs {needed / 2**20:,.0f} MiB beside the live epoch, but "
            f"{free / 2**20:,.0f} MiB are free; nothing was begun: use more shards on other "
            "nodes, a smaller key_dtype, or free memory"
        )


def _number(file: str) -> int | None:
    try:
        return int(Path(file).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such container, or "max": no limit
        return None
