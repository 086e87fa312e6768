"""How the memory's actors are found, and how weights travel between them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NAMESPACE = "pluglm-memory"

PackedWeights = dict[str, tuple[str, npt.NDArray[Any]]]


def shard_name(memory: str, shard: int) -> str:
    return f"{memory}-shard-{shard}"


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
