"""How the memory's actors are named and found, and how weights travel between them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memory_server.index.base import IndexSettings
from memory_server.store.segments import SegmentMeta

NAMESPACE = "pluglm-memory"

PackedWeights = dict[str, tuple[str, npt.NDArray[Any]]]
Address = tuple[int, int]
"""(shard, replica)"""

_SHARD = re.compile(r"(.+)-shard-\d+-\d+")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a client must know to search a memory, and a coordinator to lead it.

    Attributes:
        state_dir: where the coordinator keeps its book and the weights.
        detached: its actors outlive the driver that started them.
        hedge_after_s: seconds until a second replica is asked too; "p95": as measured.
        fan_in: shards that one relay asks, when there are more.
        queries: how queries travel.
        tables_pay_from: entries from which new weights make keys by tables; None: never.
    """

    name: str
    shards: int
    replicas: int
    index: IndexSettings
    meta: SegmentMeta
    store_path: str
    state_dir: str
    detached: bool = False
    hedge_after_s: float | Literal["p95"] = "p95"
    fan_in: int = 16
    queries: Literal["float16", "float32"] = "float16"
    tables_pay_from: int | None = None

    @property
    def addresses(self) -> list[Address]:
        return [(shard, r) for shard in range(self.shards) for r in range(self.replicas)]

    @property
    def host_names(self) -> list[str]:
        return [shard_name(self.name, *address) for address in self.addresses]


def shard_name(memory: str, shard: int, replica: int = 0) -> str:
    return f"{memory}-shard-{shard}-{replica}"


def memory_of(actor: str) -> str:
    """The memory to which an actor's name belongs: its coordinator has the memory's name."""
    match = _SHARD.fullmatch(actor)
    return actor if match is None else match.group(1)


def pack_weights(weights: Mapping[str, Tensor]) -> PackedWeights:
    """Copy weights into numpy arrays, which Ray's object store shares between processes."""
    packed: PackedWeights = {}
    for name, tensor in weights.items():
        plain = tensor.detach().cpu().contiguous()
        dtype = str(plain.dtype).removeprefix("torch.")
        if plain.dtype == torch.bfloat16:  # numpy has no bfloat16: its bits travel
            plain = plain.view(torch.int16)
        packed[name] = (dtype, np.array(plain.numpy(), copy=True))
    return packed


def unpack_weights(packed: PackedWeights) -> dict[str, Tensor]:
    """The weights again, copied, so that the object store may let go of its own."""
    weights = {}
    for name, (dtype, array) in packed.items():
        tensor = torch.from_numpy(np.array(array, copy=True))
        weights[name] = tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
    return weights
