"""`pluglm memory compact|verify|gc`: the files of a memory."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from cluster.cli.command import Command, positive
from cluster.cli.memory_options import (
    add_json,
    add_server,
    add_store,
    given_server,
    message,
    opened_store,
)
from cluster.cli.text import size
from memory_server.errors import StoreError

if TYPE_CHECKING:
    from memory_server.store.store import Store

_SHOWN_FILES = 20
_HOUR_S = 3600.0


def _compact_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument(
        "--domain", nargs="+", metavar="NAME", help="only these domains (default: all)"
    )
    parser.add_argument(
        "--target-rows",
        type=positive,
        default=1 << 20,
        metavar="N",
        help="rows of a segment (default: %(default)s)",
    )
    parser.add_argument(
        "-m", "--message", type=message, metavar="TEXT", help="what the log says of this"
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what it would do")
    add_server(parser, does="a running memory server of this store: have it answer from the result")
    add_json(parser)


def _compact(options: argparse.Namespace) -> int:
    from cluster.editing.live import check_same_memory, show_version

    store = opened_store(options.store)
    with given_server(options) as memory:
        if memory is not None:
            check_same_memory(store, memory)
        done = store.compact(
            domains=options.domain,
            target_rows=options.target_rows,
            message=options.message,
            dry_run=options.dry_run,
        )
        epoch = None
        if memory is not None and done.version is not None:
            epoch = show_version(store, memory, done.version)
    if options.json:
        print(json.dumps({**vars(done), "dry_run": options.dry_run, "epoch": epoch}, indent=1))
        return 0
    said = "would go" if options.dry_run else "go"
    print(
        f"segments: {done.segments_before:,} → {done.segments_after:,}; {done.rows_dropped:,} "
        f"removed rows {said}; {size(done.bytes_written)} written"
    )
    if done.version is not None:
        print(f"version {done.version}; the old files stay until `pluglm memory gc`")
    else:
        print("dry run: nothing is committed" if options.dry_run else "there was nothing to do")
    if epoch is not None:
        print(f"the server {options.server} answers from it (epoch {epoch})")
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument("version", nargs="?", metavar="V", help="a version (default: the head)")
    parser.add_argument("--all", action="store_true", help="all versions that are kept")
    add_json(parser)


def _verify(options: argparse.Namespace) -> int:
    store = opened_store(options.store, check=False)
    version = None if options.version is None else store.resolve(options.version)
    damages = store.damages(version, all_versions=options.all)
    if options.json:
        print(json.dumps([vars(damage) for damage in damages], indent=1))
        return 1 if damages else 0
    if not damages:
        # What no checksum of a file can tell.
        store.verify(version, all_versions=options.all)
        print("verified: every file is as it was written")
        return 0
    for damage in damages:
        print(f"{damage.file}: {damage.reason}")
    print(f"{len(damages)} damaged; restore them from a copy")
    return 1


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = -1.0
    if not hours >= 0:  # NaN neither
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours of 0 or more")
    return hours


def _gc_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument(
        "--keep",
        type=positive,
        default=10,
        metavar="N",
        help="newest versions to keep, beside those with a tag (default: %(default)s)",
    )
    parser.add_argument(
        "--min-age-hours",
        type=_hours,
        default=24.0,
        metavar="H",
        help="younger versions and files are kept too (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what it would remove")
    add_server(parser, does="a running memory server of this store: keep the versions that it uses")
    add_json(parser)


def _versions_of_servers(store: Store) -> set[str]:
    """What servers that keep their state in the store answer from, running or not, as long as it is
    there; those that keep it elsewhere are named with --server."""
    from memory_server.actors.state import versions_of_servers

    try:
        servers = store.path / "servers"
    except StoreError:  # a store elsewhere holds no state
        return set()
    there = {entry.version for entry in store.log() if not entry.collected}
    return versions_of_servers(servers) & there


def _gc(options: argparse.Namespace) -> int:
    from cluster.editing.live import check_same_memory

    # A damaged head may be rolled back, to a version that a collection would give up.
    store = opened_store(options.store, check=not options.dry_run)
    protect = _versions_of_servers(store)
    with given_server(options) as memory:
        if memory is not None:
            from cluster.memory_servers import versions_in_use

            check_same_memory(store, memory)
            protect |= versions_in_use(memory)
        done = store.gc(
            keep_versions=options.keep,
            min_age_s=options.min_age_hours * _HOUR_S,
            protect=sorted(protect),
            incoming_age_s=options.min_age_hours * _HOUR_S,
            dry_run=options.dry_run,
        )
    if options.json:
        value: dict[str, Any] = {**vars(done), "dry_run": options.dry_run}
        print(json.dumps(value, indent=1))
        return 0
    word = "would be removed" if options.dry_run else "removed"
    print(f"{word}: {len(done.files):,} files, {size(done.bytes)}")
    for name in done.files[:_SHOWN_FILES]:
        print(f"  {name}")
    if len(done.files) > _SHOWN_FILES:
        print(f"  … and {len(done.files) - _SHOWN_FILES:,} more (--json shows all)")
    if done.collected:
        print(
            f"versions that cannot be rolled back to any more: {', '.join(done.collected[:10])}"
            + (f" and {len(done.collected) - 10:,} more" if len(done.collected) > 10 else "")
        )
    return 0


COMPACT = Command(
    name="memory compact",
    summary="join small segments, drop removed rows",
    description="""\
Join a memory's small segments and leave removed rows out, in a new version with the
same entries.""",
    example="""\
pluglm memory compact data/articles --dry-run
pluglm memory compact data/articles --domain news""",
    configure=_compact_arguments,
    run=_compact,
)

VERIFY = Command(
    name="memory verify",
    summary="read every byte and compare checksums",
    description="""\
Read every byte that a version depends on, and compare it with its checksum. Names
each damaged file and ends with exit code 1 if there is one.""",
    example="""\
pluglm memory verify data/articles
pluglm memory verify data/articles --all --json""",
    configure=_verify_arguments,
    run=_verify,
)

GC = Command(
    name="memory gc",
    summary="remove files that no kept version needs",
    description="""\
Give up old versions, and remove the files that only they need. It says what it
removes; that cannot be undone. Versions with a tag, the newest, the young, and
those that the named server uses are kept.""",
    example="""\
pluglm memory gc data/articles --dry-run
pluglm memory gc data/articles --keep 3 --min-age-hours 1 --server wiki""",
    configure=_gc_arguments,
    run=_gc,
)
