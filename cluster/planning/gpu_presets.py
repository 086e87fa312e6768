"""The GPUs of gpus.toml, by the makers' data sheets, and what is assumed beside them."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("gpus.toml")
_GB, _GIB = 1e9, 1 << 30


@dataclass(frozen=True, kw_only=True)
class GpuSheet:
    """One GPU's data sheet; rates per second, `half_flops` dense."""

    kind: str
    name: str
    source: str
    memory_bytes: int
    memory_bytes_per_s: float
    float32_flops: float
    half_flops: float
    bfloat16: bool
    pcie_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the data sheet's rates that are reckoned with; see gpus.toml."""

    memory: float
    gather: float
    float32: float
    half: float
    pinned: float
    pageable: float
    search_fixed_s: float
    rescore_fixed_s: float
    per_query_s: float


@dataclass(frozen=True, kw_only=True)
class HostSheet:
    """What is assumed of a node's processors; see gpus.toml."""

    cores: int
    memory_bytes: int
    memory_bytes_per_s: float
    float32_flops: float
    disk_bytes_per_s: float
    row_s_per_thread: float
    build_s_per_thread: float
    direct_s_per_thread: float
    approximate: Mapping[str, Mapping[str, float]]


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def gpu_kinds() -> list[str]:
    """The names that `gpu_sheet` knows."""
    return list(_file()["gpus"])


def gpu_sheet(kind: str) -> GpuSheet:
    """One GPU, by its name in gpus.toml, in any case of letters.

    Raises:
        ValueError: there is none; names the nearest.
    """
    known = {name.lower(): name for name in gpu_kinds()}
    if kind.lower() not in known:
        starting = [name for name in known.values() if name.lower().startswith(kind.lower())]
        near = starting or difflib.get_close_matches(kind, list(known.values()), n=1)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"--gpu {kind}: {hint}known are {', '.join(known.values())}; for another, give the "
            "--calibration of it"
        )
    name = known[kind.lower()]
    table = _file()["gpus"][name]
    return GpuSheet(
        kind=name,
        name=table["name"],
        source=table["source"],
        memory_bytes=int(table["device_gb"] * _GB),
        memory_bytes_per_s=table["memory_gb_per_s"] * _GB,
        float32_flops=table["float32_tflops"] * 1e12,
        half_flops=table["half_tflops"] * 1e12,
        bfloat16=table["bfloat16"],
        pcie_bytes_per_s=table["pcie_gb_per_s"] * _GB,
    )


def efficiency() -> Efficiency:
    """What is assumed of every GPU."""
    return Efficiency(**_file()["efficiency"])


def training_share(hidden: int, *, on_gpu: bool) -> float:
    """Of large products' rate that a whole training step of a model of this width reaches."""
    table = _file()["training"]
    if not on_gpu:
        return float(table["share"])
    return float(min(table["gpu_most"], table["gpu_share"] * (hidden / 768) ** table["gpu_power"]))


def host_sheet(*, cores: int | None = None, memory_bytes: int | None = None) -> HostSheet:
    """A node's processors; another number of cores has its share of the rates."""
    table = _file()["host"]
    count = cores or table["cores"]
    times = count / table["cores"]
    return HostSheet(
        cores=count,
        memory_bytes=memory_bytes or int(table["memory_gib"] * _GIB),
        memory_bytes_per_s=table["memory_gb_per_s"] * _GB * times,
        float32_flops=table["float32_tflops"] * 1e12 * times,
        disk_bytes_per_s=table["disk_gb_per_s"] * _GB,
        row_s_per_thread=table["row_s_per_thread"],
        build_s_per_thread=table["build_s_per_thread"],
        direct_s_per_thread=table["direct_s_per_thread"],
        approximate=table["approximate"],
    )
