"""Run a command as a person does, and measure its time and the memory of all its processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PLUGLM = (sys.executable, "-c", "import sys; from cluster.cli import main; sys.exit(main())")
"""The console script of the environment that runs the benchmark."""

_PAUSE_S = 0.5
_SAMPLES_PER_PSS = 8
_END_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A command that succeeded.

    Attributes:
        seconds: from its start to its end.
        peak_rss_gib: largest sum, over its processes at one moment, of resident memory; what they
            share (mapped files, libraries) is counted once per process.
        peak_pss_gib: the same with shared pages split among the sharers, from fewer samples; None
            where the system does not tell.
        peak_processes: most processes at one moment.
    """

    seconds: float
    peak_rss_gib: float
    peak_pss_gib: float | None
    peak_processes: int


def watch(command: Sequence[str | Path], *, cwd: Path, log: Path) -> Watched:
    """Run a command to its end; blocks. What it prints goes to the log file.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    rss = pss = 0.0
    processes = samples = 0
    with log.open("wb") as file:
        began = time.perf_counter()
        child = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        root = psutil.Process(child.pid)
        try:
            while True:
                family = _family(root)
                rss = max(rss, sum(_rss(process) for process in family))
                # Reading it walks a process's page tables, so it is asked for more rarely.
                if samples % _SAMPLES_PER_PSS == 0:
                    pss = max(pss, sum(_pss(process) for process in family))
                processes = max(processes, len(family))
                samples += 1
                try:
                    child.wait(_PAUSE_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
            elapsed = time.perf_counter() - began
        finally:
            _end(root, child)
    if child.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise RuntimeError(
            f"{' '.join(map(str, command[-6:]))}: ended with {child.returncode}\n" + "\n".join(last)
        )
    return Watched(
        seconds=elapsed,
        peak_rss_gib=rss / 2**30,
        peak_pss_gib=pss / 2**30 or None,
        peak_processes=processes,
    )


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _pss(process: psutil.Process) -> int:
    try:
        return int(getattr(process.memory_full_info(), "pss", 0))
    except psutil.Error:
        return 0


def _end(root: psutil.Process, child: subprocess.Popen[bytes]) -> None:
    """Whatever happened, leave no process behind: ask first, then insist."""
    if child.poll() is not None:
        return
    family = _family(root)
    child.terminate()
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
    for process in psutil.wait_procs(family, timeout=_END_S)[1]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    child.wait()
