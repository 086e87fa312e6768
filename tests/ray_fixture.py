"""A small Ray for tests: `with local_ray():` starts one and always ends it."""

import contextlib
from collections.abc import Iterator

import ray


@contextlib.contextmanager
def local_ray(num_cpus: int = 4) -> Iterator[None]:
    """Start Ray on this machine alone; the processes that it started end with it."""
    ray.init(
        # Without an address Ray would join one that happens to run on this machine.
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        _system_config={"worker_niceness": 0},
        log_to_driver=False,
    )
    try:
        yield
    finally:
        ray.shutdown()
