"""Ray for the time of one run: started here and ended again, or a cluster that is joined."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.errors import Interrupted, LaunchError

_LOOPBACK = "127.0.0.1"
_KNOCK_S = 10.0
_OTHERWISE = 'or use cluster.address = "local" to start one for this run'


@contextmanager
def ray_session(config: ClusterConfig, *, cpus: int, otherwise: str = _OTHERWISE) -> Iterator[None]:
    """Have Ray running inside the block.

    Args:
        config: where Ray comes from.
        cpus: what the run's actors reserve; a Ray started here plans with at least as many, however
            many cores there are, so that a small machine runs the same code more slowly.
        otherwise: what else one may do where no Ray answers.

    Raises:
        LaunchError: no Ray answers at the address, or it cannot be started.
    """
    if ray.is_initialized():
        raise LaunchError("this process is already connected to Ray; call ray.shutdown() first")
    # Read by Ray's own processes when they start: nothing is sent anywhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        _start_or_join(config, cpus=cpus, otherwise=otherwise)
        yield
    finally:
        # Also after a start that was cut short, which leaves some of Ray's processes.
        ray.shutdown()


def _start_or_join(config: ClusterConfig, *, cpus: int, otherwise: str) -> None:
    common: dict[str, Any] = {
        "logging_level": logging.ERROR,
        # Actors report through the driver; their own output stays in Ray's log files.
        "log_to_driver": False,
        "configure_logging": True,
    }
    try:
        if config.address == "local":
            ray.init(
                address="local",
                num_cpus=config.num_cpus or cpus,
                include_dashboard=config.dashboard,
                object_store_memory=config.object_store_mib * 2**20,
                _node_ip_address=_LOOPBACK,
                _temp_dir=config.ray_temp_dir or None,
                # At Ray's own niceness of 15 a busy machine starves the memory's shards.
                _system_config={"worker_niceness": 0},
                **common,
            )
            return
        if config.address != "auto":
            _knock(config.address)
        ray.init(address=config.address, **common)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise LaunchError(
            f'no Ray at cluster.address = "{config.address}" ({reason}); start one there with '
            "`ray start --head`; if it asks for a token, set RAY_AUTH_MODE=token here (Ray does so "
            f'by itself only for "auto"); {otherwise}'
        ) from error
    except SystemExit as error:
        # Ray's own handler of SIGTERM, which is in force while it starts.
        raise Interrupted(signal.SIGTERM) from error


def _knock(address: str) -> None:
    """Raise OSError where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
