"""The `pluglm` command: a file per group of commands, and nothing heavy until one of them runs."""

from cluster.cli.app import main

__all__ = ["main"]
