"""One driver per run directory: two would write over each other's checkpoints and metrics."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import LaunchError

_LOCK = ".lock"
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; freed by the system if this process dies.

    Raises:
        LaunchError: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    # Not truncated on opening: the holder's number must stay readable to who comes second.
    with (run_dir / _LOCK).open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                raise LaunchError(
                    f"{run_dir} cannot be locked ({error.strerror}), so that two runs could write "
                    "over each other there: mount its filesystem with locks (Lustre: -o flock; "
                    "NFS: with lockd), or choose another directory with run.dir=DIR"
                ) from error
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise LaunchError(
                f"{run_dir} is in use by process {holder}; wait for it, or choose another "
                "directory with run.dir=DIR"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
