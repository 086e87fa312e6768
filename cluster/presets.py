"""The configurations that ship with the project, found in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from trainer.settings import ConfigError

_HERE = Path(__file__).resolve().parent


def preset(name: str) -> Path:
    """The path of a shipped configuration.

    Args:
        name: file name without ``.toml``, such as ``quickstart``.

    Raises:
        ConfigError: there is none of this name.
    """
    # setup.py installs the folder configs/ of a checkout as cluster/configs.
    for folder in (_HERE / "configs", _HERE.parent / "configs"):
        path = folder / f"{name}.toml"
        if path.is_file():
            return path
    raise ConfigError(f"no shipped configuration named {name}; see the folder configs/")
