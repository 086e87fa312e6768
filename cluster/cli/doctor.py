"""`pluglm doctor`: what would go wrong, found before hours are spent."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

from cluster.cli.command import Command, UsageError, positive

_MARK = {"ok": "ok      ", "warning": "warning ", "problem": "PROBLEM "}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG.toml", help="of a run that is to be started"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as for `pluglm pretrain`"
    )
    parser.add_argument(
        "--address",
        default="",
        metavar="A",
        help='of a Ray cluster, "auto" or host:port; without it this node alone is looked at',
    )
    parser.add_argument(
        "--nodes", type=positive, default=1, metavar="N", help="that the cluster is to have"
    )
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="S", help="seconds to wait for them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def _run(options: argparse.Namespace) -> int:
    from cluster.config import load_config
    from cluster.doctor.examine import examine

    if options.nodes > 1 and not options.address:
        raise UsageError("--nodes counts those of a cluster: give its --address, too")
    if not 0 <= options.wait < math.inf:
        raise UsageError(f"--wait {options.wait}: give seconds, 0 or more")
    config = None
    if options.config is not None:
        config = load_config(options.config, options.overrides)
    found = []
    for finding in examine(
        config, address=options.address, nodes=options.nodes, wait_s=options.wait
    ):
        found.append(finding)
        if not options.json:
            fix = f"\n        -> {finding.fix}" if finding.fix else ""
            print(f"{_MARK[finding.grade]}{finding.what}{fix}", flush=True)
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    return int(any(finding.grade == "problem" for finding in found))


DOCTOR = Command(
    name="doctor",
    summary="look a node or a cluster over before hours are spent",
    description="""\
Look at this node, or at every node of a Ray cluster: versions of Python and packages, GPUs,
shared memory, clocks, an all-reduce over gloo (and NCCL where there are two GPUs), and, for a
run that is to be started, whether its configuration fits its corpus, whether all nodes see its
directories, whether the disk has room for its checkpoints, and whether Ray has what it takes.
Each line is ok, a warning or a problem with what to do; exit code 1 if there is a problem.""",
    example="""\
pluglm doctor
pluglm doctor configs/pluglm-base.toml data.corpus=/data/wiki --address head:6379 --nodes 4""",
    configure=_arguments,
    run=_run,
)
