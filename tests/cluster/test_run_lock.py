"""Two drivers never share a run directory."""

from __future__ import annotations

import errno
import os
import socket
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
        wanted = f"{os.getpid()} on {socket.gethostname()}"
        assert (tmp_path / ".lock").read_text() == wanted
    with run_lock(tmp_path):
        pass


def test_a_filesystem_without_locks_is_not_a_run_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(LaunchError, match=r"cannot be locked .*Lustre: -o flock"),
        run_lock(tmp_path),
    ):
        pytest.fail("locked without a lock")
