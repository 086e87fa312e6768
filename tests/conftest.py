"""What all tests share: an environment that reaches no network, a seed, and the GPU's absence."""

import os
import random
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# Before any test module imports transformers, Ray or wandb, which read these once.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A developer's own account, cluster or modes must not change what is tested.
for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_MODE", "WANDB_PROJECT", "RAY_ADDRESS"):
    os.environ.pop(name, None)

STARTS_RAY = (
    "tests/integration/",
    "tests/cluster/test_memory_docs.py",
    "tests/cluster/test_memory_served.py",
)

# A busy machine is not a failure, and a failure must come again on the next run.
settings.register_profile("pluglm", deadline=None, derandomize=True)
settings.load_profile("pluglm")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--long`: also the tests that take minutes."""
    parser.addoption("--long", action="store_true", help="run tests marked long, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where CUDA has no device, and `long` ones unless asked for."""
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run with --long"))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How several processes (`-n 2`) share the tests out.

    A file's tests stay together, for what they set up together. All that start Ray stay with one
    process: two Rays at once would crowd a small machine.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Sharing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file.startswith(STARTS_RAY) or "[ray" in nodeid else file

    return Sharing(config, log)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in a test whether it runs alone or after others."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
