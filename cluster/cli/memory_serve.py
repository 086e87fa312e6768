"""`pluglm memory serve|servers|show|cancel|stop`: a memory that outlives the runs that use it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError, positive
from cluster.cli.memory_options import (
    add_address,
    add_json,
    add_store,
    opened_store,
    some_path,
    whole_number,
)
from cluster.cli.text import table

if TYPE_CHECKING:
    from cluster.memory_servers import ServeSettings
    from memory_server.api import MemoryInfo


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument(
        "--model", type=some_path, metavar="DIR", help="whose keys (default: the run's own model)"
    )
    parser.add_argument("--name", required=True, help="by which trainers and tools find it")
    parser.add_argument(
        "--address",
        default="auto",
        metavar="ADDR",
        help='the Ray to serve in: "auto" (the one that runs on this machine), host:port, or '
        '"local": start one that lasts as long as this command (default: %(default)s)',
    )
    parser.add_argument("--shards", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--replicas", type=positive, default=1, metavar="N", help="of each shard (default: 1)"
    )
    parser.add_argument(
        "--placement",
        choices=("spread", "pack"),
        default="spread",
        help="shards over many nodes, or few (default: %(default)s)",
    )
    parser.add_argument(
        "--threads-per-shard", type=positive, default=1, metavar="N", help="default: 1"
    )
    parser.add_argument(
        "--gpus-per-shard", type=float, default=0.0, metavar="X", help="above 0: keys on a GPU"
    )
    parser.add_argument(
        "--index",
        default="flat",
        metavar="KIND",
        help='"flat" (exact), or approximate: "ivf", "pq" or a FAISS factory string '
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--key-dtype",
        choices=("float32", "float16", "bfloat16", "int8"),
        default="float32",
        help="how keys are held (default: %(default)s)",
    )
    parser.add_argument(
        "--search-params", default="", metavar="P", help='of a FAISS index, such as "nprobe=8"'
    )
    parser.add_argument(
        "--min-recall",
        type=float,
        default=0.95,
        metavar="R",
        help="an approximate index answers only while its measured recall is this "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--audit-every",
        type=_above_zero,
        default=60.0,
        metavar="SECONDS",
        help="between two measurements of the recall (default: %(default)g)",
    )
    parser.add_argument(
        "--queue-limit",
        type=positive,
        default=256,
        metavar="N",
        help="searches that may wait at a shard before others are refused (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-limit-gib",
        type=_above_zero,
        metavar="X",
        help="of all keys on one node, those of coming epochs included (default: what is free)",
    )
    parser.add_argument(
        "--deadline",
        type=_above_zero,
        default=60.0,
        metavar="SECONDS",
        help="how long this command waits for a shard that does not answer; trainers have "
        "memory.deadline_s of their own (default: %(default)g)",
    )
    parser.add_argument("--version", metavar="V", help="of the store (default: the head)")
    parser.add_argument(
        "--state-dir",
        type=some_path,
        metavar="DIR",
        help="where it keeps what a restart needs (default: in the store)",
    )
    add_json(parser)


def _settings(options: argparse.Namespace) -> ServeSettings:
    from cluster.memory_servers import ServeSettings
    from memory_server.index.base import IndexSettings

    limit = options.memory_limit_gib
    return ServeSettings(
        name=options.name,
        shards=options.shards,
        replicas=options.replicas,
        placement=options.placement,
        index=IndexSettings(
            kind=options.index,
            key_dtype=options.key_dtype,
            search=options.search_params,
            min_recall=options.min_recall,
            audit_every_s=options.audit_every,
        ),
        threads_per_shard=options.threads_per_shard,
        gpus_per_shard=options.gpus_per_shard,
        content_version=options.version,
        state_dir=options.state_dir,
        deadline_s=options.deadline,
        queue_limit=options.queue_limit,
        memory_limit_bytes=None if limit is None else max(1, int(limit * 2**30)),
    )


def _serve(options: argparse.Namespace) -> int:
    from cluster.cli.places import is_run, run_model

    model = options.model
    if model is None:
        if not is_run(Path(options.store)):
            raise UsageError(
                f"{options.store} is no run directory, so --model is needed; see "
                "`pluglm memory serve --help`"
            )
        model = run_model(Path(options.store))
    settings, store = _settings(options), opened_store(options.store)
    from cluster.memory_servers import joined_ray, serve, serve_in_foreground

    if options.address == "local":
        serve_in_foreground(store, model, settings, lambda info, at: _tell(info, options, at))
        return 0
    with joined_ray(options.address):
        info = serve(store, model, settings)
    _tell(info, options, options.address)
    return 0


def _tell(info: MemoryInfo, options: argparse.Namespace, address: str) -> None:
    name = options.name
    if options.json:
        value = {
            "name": name,
            "address": address,
            "entries": info.entries,
            "shards": info.shards,
            "epoch": info.epoch,
            "content_version": info.content_version,
            "index": info.index,
        }
        print(json.dumps(value, indent=1), flush=True)
        return
    by_default = "auto" if options.address == "local" else address
    print(
        f"memory {name} serves {info.entries:,} entries in {info.shards} shards ({info.index}) of "
        f"version {info.content_version}\n"
        f'trainers attach with memory.server="{name}" cluster.address="{by_default}", tools with '
        f"--server {name} --address {by_default}",
        flush=True,
    )
    if options.address == "local":
        print(
            f"where several Rays run, this one is {address}; it asks for its token: set "
            "RAY_AUTH_MODE=token",
            flush=True,
        )
        print("serving until Ctrl-C or `pluglm memory stop`", file=sys.stderr, flush=True)


def _servers_arguments(parser: argparse.ArgumentParser) -> None:
    add_address(parser)
    add_json(parser)


def _servers(options: argparse.Namespace) -> int:
    from cluster.memory_servers import joined_ray, servers

    with joined_ray(options.address):
        found = servers()
    if options.json:
        print(json.dumps([vars(server) for server in found], indent=1))
        return 0
    if not found:
        print("no memory server runs there")
        return 0
    rows_shown = [
        [
            server.name,
            server.state,
            "-" if server.entries is None else f"{server.entries:,}",
            "-" if server.shards is None else f"{server.shards}x{server.replicas}",
            "-" if server.epoch is None else str(server.epoch),
            server.content_version or "-",
            server.store_path or "-",
        ]
        for server in found
    ]
    head = ("name", "state", "entries", "shards", "epoch", "version", "store")
    print(table(head, rows_shown, most=(30, 14, 15, 8, 8, 16, 60), right=(2, 4)))
    return 0


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the server")
    parser.add_argument(
        "version", nargs="?", default="HEAD", metavar="V", help="of its store (default: the head)"
    )
    add_address(parser)


def _show(options: argparse.Namespace) -> int:
    from cluster.memory_servers import attached, show

    with attached(options.name, options.address) as memory:
        epoch = show(memory, options.version)
        version = memory.info().content_version
    print(f"the server {options.name} answers from version {version} (epoch {epoch})")
    return 0


def _cancel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the server")
    parser.add_argument(
        "epoch",
        type=whole_number,
        metavar="EPOCH",
        help="the number that `pluglm memory stats` tells",
    )
    add_address(parser)


def _cancel(options: argparse.Namespace) -> int:
    from cluster import memory_servers

    with memory_servers.attached(options.name, options.address) as memory:
        live = memory_servers.cancel(memory, options.epoch)
    print(
        f"the server {options.name} gives epoch {options.epoch} up, and goes on answering from "
        f"epoch {live}"
    )
    return 0


def _stop_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the server")
    parser.add_argument(
        "--forget", action="store_true", help="remove what it kept for a restart, too"
    )
    add_address(parser)


def _stop(options: argparse.Namespace) -> int:
    from cluster.memory_servers import joined_ray, stop

    with joined_ray(options.address):
        stop(options.name, forget=options.forget)
    print(f"the server {options.name} has ended; its store is as it was")
    return 0


SERVE = Command(
    name="memory serve",
    summary="serve a memory to trainers and tools",
    description="""\
Start a memory server with a model's keys in a Ray that runs already (`ray start
--head` starts one), and return when it answers. It outlives the runs and tools
that attach to it by its name, and ends with `pluglm memory stop`.

With --address local there need not be a Ray: one is started for this machine, and
the command stays in the foreground until it is interrupted, since only Ray's own
command can start one that stays behind.""",
    example="""\
pluglm memory serve runs/first --name wiki
pluglm memory serve data/articles --model runs/first/model --name wiki --shards 4 --replicas 2
pluglm memory serve runs/first --name wiki --address local --index ivf --key-dtype int8""",
    configure=_serve_arguments,
    run=_serve,
)

SERVERS = Command(
    name="memory servers",
    summary="list the memory servers of a Ray cluster",
    description="List the memories that a Ray cluster serves.",
    example="pluglm memory servers --address head-node:6379",
    configure=_servers_arguments,
    run=_servers,
)

SHOW = Command(
    name="memory show",
    summary="have a server answer from a version",
    description="""\
Have a running server answer from a version of its store, by default the head: what
was committed without --server, or what it refused before. Returns when every later
reply reflects it.""",
    example="pluglm memory show wiki",
    configure=_show_arguments,
    run=_show,
)

CANCEL = Command(
    name="memory cancel",
    summary="have a server give up an epoch that it stages",
    description="""\
Have a running server stop staging an epoch, and free what that took: a refresh with
new weights, or an edit, that takes too long or too much memory. It goes on answering
from the epoch that is live. The store is as it was: an edit stays committed, and
`pluglm memory show` stages it again.""",
    example="pluglm memory cancel wiki 7",
    configure=_cancel_arguments,
    run=_cancel,
)

STOP = Command(
    name="memory stop",
    summary="end a memory server",
    description="End a memory server. Its store, and what a restart needs, stay.",
    example="pluglm memory stop wiki",
    configure=_stop_arguments,
    run=_stop,
)
