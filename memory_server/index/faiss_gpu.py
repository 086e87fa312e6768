"""Whether FAISS can use a GPU: that it sees one does not mean that it has code for it."""

import subprocess
import sys
from functools import cache

import faiss
import torch

TRIAL_S = 120
# In a process of its own: where FAISS has no kernel for a GPU, it aborts the process that asks.
# PyPI's faiss-gpu-cu12 1.14.1.post1 holds code for compute capability 7.0 and 8.0 alone, and an
# H200 (9.0) runs neither.
_TRIAL = """
import sys
import faiss, numpy
index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), 8, faiss.GpuIndexFlatConfig())
index.add(numpy.eye(8, dtype="float32"))
found = index.search(numpy.eye(8, dtype="float32"), 1)[1][:, 0]
sys.exit(0 if (found == numpy.arange(8)).all() else 3)
"""


def gpu_count() -> int:
    """GPUs that this FAISS sees; 0 for its CPU build, and where there is none."""
    if not hasattr(faiss, "StandardGpuResources"):
        return 0
    return int(faiss.get_num_gpus())


@cache
def gpu_trouble() -> str:
    """Why FAISS cannot search on the first GPU that it sees; empty: it can.

    Tries it once per process, in another one; blocks for some seconds.
    """
    if not gpu_count():
        return "it sees no GPU"
    try:
        # What is run is this file's own text, with nothing of a user's in it.
        tried = subprocess.run(
            [sys.executable, "-c", _TRIAL], capture_output=True, text=True, timeout=TRIAL_S
        )
    except subprocess.TimeoutExpired:
        return f"a search of 8 keys took longer than {TRIAL_S} s"
    if tried.returncode == 0:
        return ""
    said = [line for line in tried.stderr.splitlines() if line.strip()]
    cuda = [line for line in said if "CUDA error" in line]
    last = (cuda or said or [f"exit code {tried.returncode}"])[-1]
    return f"a search of 8 keys failed: {last.rpartition('details: ')[2].strip()}"


def check_device(device: torch.device) -> None:
    """Raise ValueError if FAISS cannot serve a shard on this device; may block for seconds."""
    if device.type == "cpu":
        return
    if gpu_count() <= (device.index or 0):
        raise ValueError(
            f"a FAISS index for a shard on {device} needs a FAISS that sees this GPU, and this one "
            f"sees {gpu_count()}; install the extra gpu (faiss-gpu-cu12) in place of cpu, take "
            'index="flat", or put the shard on the CPU'
        )
    if trouble := gpu_trouble():
        raise ValueError(
            f"FAISS {faiss.__version__} cannot search on this GPU: {trouble}; take "
            'index="flat", which PyTorch searches on every GPU, put the shard on the CPU, or '
            "install a FAISS that was built for this GPU's compute capability"
        )
