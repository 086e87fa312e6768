"""Two drivers never share a run directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import LaunchError
from cluster.run_lock import run_lock

HOLD = """
import sys, time
from pathlib import Path
from cluster.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_driver_is_told_who_holds_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        with (
            pytest.raises(LaunchError, match=f"in use by process {holder.pid}"),
            run_lock(tmp_path),
        ):
            pytest.fail("the lock was given twice")
    finally:
        holder.kill()
        holder.wait()
    with run_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    with run_lock(tmp_path):
        pass
