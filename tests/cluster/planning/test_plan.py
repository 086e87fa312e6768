"""`pluglm plan`: what it tells, what it refuses, and that what it proposes fits."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.config import load_config
from cluster.presets import preset
from tests.cluster.tiny_run import TinyRun

Capture = pytest.CaptureFixture[str]
BILLION = ["--entries", "1e9", "--gpu", "H100-80"]


def planned(words: list[str], capsys: Capture, *, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == code
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def place(told: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [place for place in told["places"] if place["name"] == name]
    return dict(found)


def test_a_billion_entries_fit_64_gpus(capsys: Capture) -> None:
    told = planned([*BILLION, "--gpus", "64", "--price-per-gpu-hour", "2"], capsys)
    assert told["fits"]
    assert told["placement"]["entries_per_shard"] == 31_250_000
    shard = place(told, "GPU of shards")
    assert shard["bytes"]["keys"] == 31_250_000 * (128 + 6)
    assert shard["bytes"]["staging (refresh)"] > shard["bytes"]["keys"]
    assert place(told, "node")["bytes"]["tokens (page cache)"] == 4 * 31_250_000 * 128
    assert told["cost"]["per_hour"] == 128
    hours = 1000 * told["step"]["seconds"] / 3600
    assert told["cost"]["per_1000_steps"] == pytest.approx(128 * hours)
    assert told["proposals"] == []


def test_twice_the_gpus_hold_half_each(capsys: Capture) -> None:
    few, many = (planned([*BILLION, "--gpus", str(n)], capsys) for n in (64, 128))
    keys = [place(told, "GPU of shards")["bytes"]["keys"] for told in (few, many)]
    assert keys[0] == 2 * keys[1]
    assert many["search"]["shard_s"] < few["search"]["shard_s"]
    assert many["refresh"]["keys_s"] == pytest.approx(few["refresh"]["keys_s"] / 2)


def test_what_does_not_fit_is_refused_and_what_is_proposed_fits(capsys: Capture) -> None:
    words = [*BILLION, "--gpus", "8", "memory.key_dtype=float32"]
    told = planned(words, capsys, code=1)
    assert not told["fits"]
    assert "a GPU of shards needs" in told["problems"][0]
    assert told["bottleneck"].startswith("memory or machines")
    assert len(told["proposals"]) >= 2
    for proposal in told["proposals"]:
        # The later word of a key wins, and so does the later option.
        again = planned([*words, *shlex.split(proposal["change"])], capsys)
        assert again["fits"], proposal["change"]


def test_the_fewest_gpus_are_few(capsys: Capture) -> None:
    words = [*BILLION, "--gpus", "8", "memory.key_dtype=float32"]
    told = planned(words, capsys, code=1)
    (change,) = [p["change"] for p in told["proposals"] if p["change"].startswith("--gpus")]
    fewest = int(change.split()[1])
    assert 8 < fewest <= 64
    planned([*words, "--gpus", str(fewest // 2)], capsys, code=1)


def test_replicas_take_as_many_gpus_as_there_are_of_them(capsys: Capture) -> None:
    config = str(preset("pluglm-base-1b"))
    words = [config, *BILLION, "--gpus", "64", "memory.replicas=2"]
    told = planned(words, capsys, code=1)
    assert any("take 96 GPUs, but there are 64" in problem for problem in told["problems"])
    assert any(proposal["change"] == "memory.replicas=1" for proposal in told["proposals"])


def test_without_a_refresh_an_edit_is_staged_and_keys_are_never_renewed(capsys: Capture) -> None:
    told = planned([*BILLION, "--gpus", "64", "memory.refresh=off"], capsys)
    held = place(told, "GPU of shards")["bytes"]
    assert "staging (refresh)" not in held
    assert held["staging (an edit)"] == held["ids, documents, marks"]
    assert "refresh" not in told
    assert any("keys stay those of the start" in warning for warning in told["warnings"])


def base(capsys: Capture, *words: str) -> dict[str, Any]:
    config = str(preset("pluglm-base"))
    told = planned([config, "--entries", "2e7", "--gpu", "A100-80", "--gpus", "8", *words], capsys)
    return told


def test_a_search_goes_to_one_replica_whole(capsys: Capture) -> None:
    one = ["runtime.trainers=1", "optim.batch_size=128", "memory.gpus_per_shard=0"]
    for replicas in (1, 2):
        search = base(capsys, *one, f"memory.replicas={replicas}")["search"]
        assert search["joined"] == 128
        assert search["pass_s"] >= search["alone_s"]
    eight = [base(capsys, f"memory.replicas={n}", "memory.gpus_per_shard=0") for n in (1, 2)]
    assert [told["search"]["joined"] for told in eight] == [1024, 512]


def test_pieces_of_a_pass_are_hidden_behind_the_layers_below_alone(capsys: Capture) -> None:
    whole, pieces = (
        base(capsys, "model.query_norm=layer", f"runtime.retrieval_chunks={n}")["step"]
        for n in (1, 4)
    )
    forward = whole["compute_s"] / 3 * 11 / 12
    assert pieces["waiting_s"] > whole["waiting_s"] - forward
    batch = base(capsys, "model.query_norm=batch", "runtime.retrieval_chunks=4")["step"]
    assert batch["waiting_s"] == pytest.approx(whole["waiting_s"])


def test_what_zero_sends_and_what_is_offloaded_is_counted(capsys: Capture) -> None:
    two, three, moved = (
        base(capsys, "--nodes", "8", "--gpus-per-node", "1", f"runtime.zero_stage={stage}", *more)
        for stage, more in ((2, []), (3, []), (2, ["runtime.offload_optimizer=cpu"]))
    )
    assert three["step"]["reduce_s"] == pytest.approx(1.5 * two["step"]["reduce_s"])
    name = "weights, gradients, optimizer"
    gpu, node = "GPU of a trainer and shards", "node"
    assert place(moved, gpu)["bytes"][name] < place(two, gpu)["bytes"][name]
    assert name not in place(two, node)["bytes"]
    assert place(moved, node)["bytes"][name] > 0
    buckets = place(two, gpu)["bytes"]["gradients in reduction"]
    assert buckets == 2 * place(three, gpu)["bytes"]["gradients in reduction"]


def test_a_shard_that_is_back_too_late_is_told(capsys: Capture) -> None:
    words = [*BILLION, "--gpus", "64", "memory.deadline_s=5"]
    told = planned(words, capsys)
    assert told["start_s"] > told["refresh"]["seconds"]
    assert any("memory.deadline_s = 5 s" in warning for warning in told["warnings"])
    told = planned([*words, "memory.replicas=2"], capsys)
    assert not any("memory.deadline_s" in warning for warning in told["warnings"])


def test_what_is_far_from_all_that_was_measured_is_told(capsys: Capture) -> None:
    words = ["--gpu", "H100-80", "--gpus", "8", "--shards-on", "host", "memory.index=pq"]
    for entries, far in (("1e6", False), ("1e9", True)):
        told = planned(["--entries", entries, *words], capsys)
        assert any("a guess" in warning for warning in told["warnings"]) == far


def test_gpus_without_work_are_told(capsys: Capture) -> None:
    told = base(capsys, "--gpus", "64")
    assert any("56 of 64 GPUs have nothing to do" in warning for warning in told["warnings"])
    words = [str(preset("pluglm-base")), "--entries", "2e7", "--gpu", "A100-80", "--gpus", "8"]
    told = planned([*words, "runtime.gpus_per_trainer=0.8", "memory.gpus_per_shard=0.5"], capsys,
                   code=1)  # fmt: skip
    assert any("cannot share one" in problem for problem in told["problems"])


def test_tokens_beyond_the_page_cache_are_a_warning(capsys: Capture) -> None:
    told = planned([*BILLION, "--gpus", "64", "--host-gib", "24"], capsys)
    assert any("page cache" in warning for warning in told["warnings"])
    assert told["refresh"]["disk_s"] > 0


def test_a_refresh_that_cannot_keep_up_is_the_bottleneck(capsys: Capture) -> None:
    words = [*BILLION, "--gpus", "64", "memory.refresh_every_steps=1"]
    told = planned(words, capsys)
    assert told["refresh"]["share"] > 1
    assert told["bottleneck"].startswith("the refresh: it takes")


def test_a_given_step_is_taken(capsys: Capture) -> None:
    told = planned([*BILLION, "--gpus", "64", "--step-s", "7.5"], capsys)
    assert told["step"]["compute_s"] == 7.5


def test_a_local_memory_has_no_trainers(capsys: Capture) -> None:
    words = ["--local", "--entries", "1e6", "--host-gib", "8", "--cores", "2"]
    told = planned([*words, "memory.key_dtype=float32"], capsys)
    assert place(told, "this process")["bytes"]["keys"] == 512_000_000
    assert "step" not in told
    smaller = planned(words, capsys)
    assert place(smaller, "this process")["bytes"]["keys"] == 134_000_000


def test_a_configuration_tells_where_its_corpus_is_there(
    tiny_run: TinyRun, capsys: Capture, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'[data]\ncorpus = "{tiny_run.corpus}"\n[memory]\nshards = 3\n', encoding="utf-8"
    )
    told = planned([str(config), "--nodes", "1", "memory.replicas=2"], capsys)
    assert told["entries"] > 0
    assert told["placement"]["shards"] == 3
    assert told["placement"]["shards_per_node"] == 6
    assert told["placement"]["entries_per_shard"] == -(-told["entries"] // 3)


def test_the_billion_entry_configuration_is_the_plan_without_one(capsys: Capture) -> None:
    config = load_config(preset("pluglm-base-1b"))
    assert config.runtime.trainers + config.memory.shards == 64
    words = [*BILLION, "--gpus", "64"]
    assert planned([str(preset("pluglm-base-1b")), *words], capsys) == planned(words, capsys)


def test_a_person_is_told_parts_times_and_the_bottleneck(capsys: Capture) -> None:
    assert main(["plan", *BILLION, "--gpus", "8", "--price-per-gpu-hour", "2"]) == 1
    shown = capsys.readouterr().out
    for word in ("ESTIMATED", "staging (refresh)", "LACKING", "bottleneck:", "DOES NOT FIT:"):
        assert word in shown
    assert "  -> fits with --gpus" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--entries is missing: give how many entries"),
        (["--entries", "0.5"], "'0.5' is not a whole number from 1 to 1e+14"),
        (["--entries", "1e15"], "'1e15' is not a whole number from 1 to 1e+14"),
        ([*BILLION, "--gpus", "8", "--batch", "3"], "--batch 3 is of --local"),
        ([*BILLION, "--local"], "--local plans a memory on a CPU"),
        (["--entries", "1e6", "--host-gib", "1e-9"], "at least 0.1 (GiB)"),
        (["--entries", "1e6", "memory.server=wiki"], "memory.server = 'wiki': the shards are that"),
        (["--entries", "1e6", "memory.index=IVF99999999,Flat"], "has 99,999,999 lists for the"),
        (["--entries", "1e9", "--gpu", "H10", "--gpus", "4"], "did you mean H100-80"),
        (["--entries", "1e9", "--gpus", "4"], "--gpus 4: say of which kind"),
        (["--entries", "1e9", "--network-gbps", "0"], "'0' is not a number above 0"),
        (["--entries", "1e9", "a.toml", "b.toml"], "b.toml: give one CONFIG.toml"),
        (["--entries", "1e9", "a.toml"], "a.toml: no such file"),
        (["--entries", "1e9", "memory.shard=3"], "did you mean memory.shards?"),
        ([*BILLION, "--gpus", "1", "--shards-on", "gpu"], "needs a GPU for a trainer and one for"),
        ([*BILLION, "--gpus", "9", "--nodes", "1"], "1 nodes of 8 GPUs have not the 9 GPUs"),
        ([*BILLION, "--entry-tokens", "999"], "model.max_positions = 512: must be at least 999"),
        (["--entries", "3", "--gpu", "L4", "--calibration", "/no/x.json"], "/no/x.json: no such"),
        (
            [*BILLION, "--gpus", "8", "--shards-on", "gpu", "memory.index=ivf"],
            "how fast it is on NVIDIA H100 80GB SXM is not known",
        ),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: Capture) -> None:
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert said in err[0]


def test_without_gpus_trainers_and_shards_share_the_cores(capsys: Capture) -> None:
    told = planned(["--entries", "1e6", "--cores", "8", "--nodes", "2"], capsys)
    assert told["placement"]["trainers"] == told["placement"]["shards"] == 2
    assert {place["name"] for place in told["places"]} == {"node", "disk that all nodes see"}
    assert "activations" in place(told, "node")["bytes"]


def test_a_local_memory_has_all_cores_of_its_machine(capsys: Capture) -> None:
    words = ["--local", "--entries", "1e8", "memory.threads_per_shard=1"]
    few, many = (planned([*words, "--cores", str(n)], capsys) for n in (2, 16))
    assert few["search"]["shard_s"] > 7 * many["search"]["shard_s"]
    assert few["refresh"]["tables_s"] == pytest.approx(8 * many["refresh"]["tables_s"])


def test_a_trainer_and_a_shard_may_share_a_gpu(capsys: Capture) -> None:
    words = [str(preset("one-gpu")), "--entries", "1e6", "--gpu", "H100-80", "--gpus", "1"]
    told = planned(words, capsys)
    shared = place(told, "GPU of a trainer and shards")
    assert shared["count"] == 1
    assert {"keys", "activations"} <= shared["bytes"].keys()
