"""What `pluglm doctor` finds, and what it says to do about it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config import load_config
from cluster.doctor.facts import FAISS, PACKAGES, NodeFacts, PathFacts, read_facts
from cluster.doctor.findings import (
    Finding,
    Places,
    of_clocks,
    of_machines,
    of_paths,
    of_versions,
)
from cluster.doctor.open_files import PER_CONNECTION, of_open_files, open_files_needed
from cluster.doctor.reduce import all_reduce
from memory_server.wire.search_client import Lanes
from memory_server.wire.shared_socket import SharedSocket
from tests.cluster.tiny_run import TinyRun

HERE = PathFacts(path="/runs", exists=True, writable=True, free_bytes=10 << 30, token="t")


def node(host: str, **options: object) -> NodeFacts:
    facts = NodeFacts(
        host=host,
        node_id=host,
        python="3.11.7",
        versions={**dict.fromkeys(PACKAGES, "1.0"), FAISS[0]: "1.0", FAISS[1]: ""},
        gpus=(),
        cpus=8,
        ram_bytes=64 << 30,
        shm_bytes=8 << 30,
        open_files=65_536,
        clock=1000.0,
        paths=(HERE,),
    )
    return replace(facts, **options)  # type: ignore[arg-type]


def grades(findings: object) -> list[str]:
    return [finding.grade for finding in findings]  # type: ignore[attr-defined]


def one_bad(findings: object, grade: str) -> Finding:
    (bad,) = [f for f in findings if f.grade != "ok"]  # type: ignore[attr-defined]
    assert bad.grade == grade
    assert bad.fix
    return bad


def test_equal_nodes_are_well() -> None:
    nodes = [node("a"), node("b")]
    assert grades(of_versions(nodes)) == ["ok"]
    assert grades(of_machines(nodes)) == ["ok"]
    assert grades(of_clocks(nodes, [1000.4, 999.9])) == ["ok"]
    assert grades(of_open_files(nodes, 5_000)) == ["ok"]
    assert grades(of_paths(nodes, places(needed={"/runs": 1 << 30}))) == ["ok"]


def test_other_versions_are_named_with_their_nodes() -> None:
    other = node("b", versions=node("b").versions | {"ray": "2.0"}, python="3.12.1")
    bad = one_bad(of_versions([node("a"), other]), "problem")
    assert "ray 1.0 on a, 2.0 on b" in bad.what
    assert "Python 3.11, 3.12" in bad.what
    patch = node("b", python="3.11.9")
    assert grades(of_versions([node("a"), patch])) == ["ok"]


def test_missing_and_doubled_packages_are_found() -> None:
    without = node("a", versions=node("a").versions | {"deepspeed": "", FAISS[0]: ""})
    assert grades(of_versions([without])) == ["problem", "warning"]
    both = node("a", versions=node("a").versions | {FAISS[1]: "1.0"})
    assert "both installed" in one_bad(of_versions([both]), "problem").what


@pytest.mark.parametrize(
    ("off", "grade"), [(5.0, "warning"), (60.0, "problem"), (-60.0, "problem")]
)
def test_a_clock_that_is_off_is_named(off: float, grade: str) -> None:
    nodes = [node("a"), node("b", clock=1000.0 + off)]
    assert (
        f"clock of b is {abs(off):.0f} s off" in one_bad(of_clocks(nodes, [1000.0] * 2), grade).what
    )


def places(**options: object) -> Places:
    given: dict[str, object] = {"needed": {"/runs": 0}, "token": "t", **options}
    return Places(**given)  # type: ignore[arg-type]


def test_directories_must_be_shared_writable_and_have_room() -> None:
    blind = node("b", paths=(replace(HERE, token=None),))
    bad = one_bad(of_paths([node("a"), blind], places()), "problem")
    assert "b does not see" in bad.what
    closed = node("b", paths=(replace(HERE, writable=False),))
    bad = one_bad(of_paths([node("a"), closed], places()), "problem")
    assert "not writable on b" in bad.what
    full = of_paths([node("a")], places(needed={"/runs": 11 << 30}))
    assert "10.0 GiB free, the run's checkpoints take 11.0 GiB" in one_bad(full, "problem").what


def test_what_is_only_read_needs_to_be_there_and_no_more() -> None:
    corpus = PathFacts(path="/corpus", exists=True, writable=False, free_bytes=0)
    read = places(needed={}, read_only=frozenset({"/corpus"}))
    assert read.paths == ["/corpus"]
    well = [node("a", paths=(corpus,)), node("b", paths=(corpus,))]
    assert grades(of_paths(well, read)) == ["ok"]
    absent = node("b", paths=(replace(corpus, exists=False),))
    assert "not there on b" in one_bad(of_paths([well[0], absent], read), "problem").what


def test_unlike_machines_and_small_shared_memory_are_a_warning() -> None:
    nodes = [node("a", gpus=("H200", "H200")), node("b")]
    assert "2 H200" in one_bad(of_machines(nodes), "warning").what
    small = one_bad(of_machines([node("a", shm_bytes=64 << 20)]), "warning")
    assert "/dev/shm" in small.what


def test_too_few_open_files_are_found_before_searches_run_out_of_them(tiny_run: TinyRun) -> None:
    few = [node("a"), node("b", open_files=1024)]
    bad = one_bad(of_open_files(few, 4_736), "problem")
    assert "b: a process may have 1,024" in bad.what
    assert "4,736" in bad.what
    assert "ulimit -n" in bad.fix
    assert "Ray asks for 4,096" in one_bad(of_open_files(few, 600), "warning").what

    def needed(*overrides: str) -> int:
        return open_files_needed(load_config(tiny_run.run / "config.toml", overrides))

    many = ("memory.shards=256", "memory.replicas=2", "runtime.trainers=1")
    # 256 shards, two replicas, four descriptors each, for the two threads that may search.
    assert needed(*many) > 4096
    assert needed(*many, "runtime.retrieval_chunks=4") > 2 * 4096
    assert needed("memory.shards=8") < 1024
    assert needed("memory.server=wiki", "cluster.address=auto") == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts them as Linux tells them")
def test_a_connection_to_a_shard_takes_as_many_descriptors_as_is_reckoned() -> None:
    servers = [
        SharedSocket("127.0.0.1", max_message_bytes=1 << 10, handle=lambda frames: None)
        for _ in range(9)
    ]
    lanes = Lanes()
    try:
        with lanes.borrow(lambda: [server.endpoint for server in servers]) as lane:
            lane.send(servers[0].endpoint, [b"x"])  # makes what all connections have in common
            before = opened_when_quiet()
            for server in servers[1:]:
                lane.send(server.endpoint, [b"x"])
            # The servers are in this process: each has one for its end of the connection.
            assert opened_when_quiet() == before + 8 * (PER_CONNECTION + 1)
    finally:
        lanes.close()
        for server in servers:
            server.close()


def opened_when_quiet() -> int:
    """How many descriptors this process has, once connections are no longer being made."""
    seen: list[int] = []
    while len(seen) < 4 or len(set(seen[-4:])) > 1:
        seen.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        time.sleep(0.05)
    return seen[-1]


def test_a_node_tells_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "name").write_text("name")
    missing = tmp_path / "not" / "yet"
    facts = read_facts([str(tmp_path), str(missing)], token_name="name", node_id="n")
    assert facts.versions["torch"]
    assert facts.cpus >= 1
    assert read_facts().open_files >= facts.open_files >= 1  # Ray would raise it
    there, absent = facts.paths
    assert (there.exists, there.writable, there.token) == (True, True, "name")
    assert (absent.exists, absent.writable, absent.token) == (False, True, None)
    assert absent.free_bytes > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["name"]


@pytest.mark.multiprocess
def test_two_processes_of_this_node_can_add_up() -> None:
    assert all_reduce("gloo").grade == "ok"


@pytest.mark.multiprocess
def test_an_all_reduce_that_hangs_ends_and_says_what_to_look_at() -> None:
    hung = all_reduce("gloo", timeout_s=0.01)
    assert hung.grade == "problem"
    assert "did not end" in hung.what
    assert "GLOO_SOCKET_IFNAME" in hung.fix


@pytest.mark.multiprocess
def test_a_run_is_looked_over_before_it_starts(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_run.run / "config.toml")
    words = ["doctor", config, f"run.dir={tmp_path}"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "the configuration fits its corpus" in out
    assert f"{tmp_path}: " in out
    assert "gloo adds up" in out
    assert "PROBLEM" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.multiprocess
def test_a_corpus_that_is_not_there_is_a_problem_and_the_rest_is_looked_at(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.toml"
    shutil.copy(tiny_run.run / "config.toml", config)
    assert main(["doctor", str(config), f"data.corpus={tmp_path / 'none'}", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    (problem,) = [one for one in found if one["grade"] == "problem"]
    assert "none" in problem["what"]
    assert any("gloo" in one["what"] for one in found)


@pytest.mark.multiprocess
def test_no_ray_at_the_address_is_a_problem_said_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--address", "127.0.0.1:1"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM no Ray at" in out
    assert "-> start Ray there" in out


@pytest.mark.parametrize("wait", ["nan", "-1", "inf"])
def test_a_wait_that_would_never_end_is_refused(
    wait: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"--wait={wait}"]) == 2
    assert "give seconds" in capsys.readouterr().err


def test_nodes_without_a_cluster_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nodes", "2"]) == 2
    assert "give its --address" in capsys.readouterr().err
