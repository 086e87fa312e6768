"""What starts a run on a cluster is right as far as one machine can tell."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.config import PretrainConfig, config_from_mapping
from cluster.errors import LaunchError
from cluster.launch.commands import ray_job_command, torchrun_command
from cluster.launch.kuberay import kuberay_manifests
from cluster.launch.plan import LaunchPlan
from cluster.launch.slurm import slurm_script

CRDS = os.environ.get("PLUGLM_KUBERAY_CRDS", "")


def config_of(**sections: dict[str, object]) -> PretrainConfig:
    fixed = {"data": {"corpus": "/data/wiki"}, "run": {"dir": "/data/runs/first"}}
    return config_from_mapping({**fixed, **sections})


def plan_of(tmp_path: Path, config: PretrainConfig | None = None, **options: Any) -> LaunchPlan:
    config = config or config_of()
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    given: dict[str, Any] = {"nodes": 2, "cpus": 4, "directory": tmp_path, **options}
    return LaunchPlan(config=config, config_path=path, **given)


# --- Slurm ----------------------------------------------------------------------------------------

FAKES = {
    "scontrol": """
case "$1" in
  show) printf 'node-a\\nnode-b\\n' ;;
  requeue) echo "requeue $2" >> "$JOURNAL" ;;
esac
""",
    # What runs on the nodes; the Ray of a job ends with it.
    "srun": 'echo "srun $*" >> "$JOURNAL"\nexec sleep 30\n',
    "ray": "exit 9\n",
    "pluglm": """
trap 'echo checkpoint >> "$JOURNAL"; exit "$STOPPED"' USR1
echo "pluglm $*" >> "$JOURNAL"
echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> "$JOURNAL"
if [ "$1" = doctor ]; then exit "${DOCTOR:-0}"; fi
if [ "$STOPPED" = none ]; then exit 0; fi
for _ in $(seq 300); do sleep 0.1; done
""",
}


class Job:
    """The script under a Slurm that is played by a few lines of shell."""

    def __init__(self, tmp_path: Path, script: str) -> None:
        self.journal = tmp_path / "journal"
        self.journal.touch()
        commands = tmp_path / "bin"
        commands.mkdir()
        for name, lines in FAKES.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{lines}")
            (commands / name).chmod(0o755)
        self._script = tmp_path / "job.sbatch"
        self._script.write_text(script)
        self._env = {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "JOURNAL": str(self.journal),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node-[a-b]",
        }

    def start(self, **env: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", str(self._script)], env=self._env | env, start_new_session=True
        )

    def lines(self) -> list[str]:
        return self.journal.read_text().splitlines()

    def wait_for(self, text: str) -> None:
        for _ in range(300):
            if any(text in line for line in self.lines()):
                return
            time.sleep(0.05)
        raise AssertionError(f"no {text!r} in {self.lines()}")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path, slurm_script(plan_of(tmp_path, gpus=2, setup=["export READY=yes"])))
    running: list[subprocess.Popen[bytes]] = []
    start = made.start

    def started(**env: str) -> subprocess.Popen[bytes]:
        running.append(start(**env))
        return running[-1]

    made.start = started  # type: ignore[method-assign]
    yield made
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_told_to_go_checkpoints_and_is_queued_again(
    job: Job, number: signal.Signals
) -> None:
    process = job.start(STOPPED="75")
    job.wait_for("pluglm pretrain")
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert job.lines()[-2:] == ["checkpoint", "requeue 4711"]


@pytest.mark.parametrize(("stopped", "code"), [("none", 0), ("1", 1)])
def test_a_job_that_is_done_or_failed_is_not_queued_again(
    job: Job, stopped: str, code: int
) -> None:
    process = job.start(STOPPED=stopped)
    if stopped != "none":
        job.wait_for("pluglm pretrain")
        time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == code
    assert not any(line.startswith("requeue") for line in job.lines())


def test_a_job_starts_one_ray_with_a_token_and_looks_the_nodes_over(job: Job) -> None:
    assert job.start(STOPPED="none").wait(20) == 0
    for node in ("--nodelist=node-a", "--exclude=node-a"):  # they run beside the script
        job.wait_for(node)
    lines = job.lines()
    head, workers = (line for line in lines if line.startswith("srun"))
    assert all("--cpus-per-task=" in line for line in (head, workers)), "srun inherits none"
    assert "--nodelist=node-a" in head
    assert "--head" in head
    assert "--num-gpus=2" in head
    assert "--exclude=node-a" in workers
    assert "--address=node-a:24711" in workers
    run = next(line for line in lines if line.startswith("pluglm pretrain"))
    assert run.endswith("config.toml cluster.address=node-a:24711 --auto-resume")
    doctor = [line for line in lines if line.startswith("pluglm doctor")]
    assert "--nodes 2" in doctor[-1]
    assert {line for line in lines if line.startswith("token")} == {"token 64"}


def test_a_job_whose_nodes_are_not_well_does_not_begin(job: Job) -> None:
    assert job.start(DOCTOR="1", STOPPED="none").wait(20) == 1
    assert not any(line.startswith("pluglm pretrain") for line in job.lines())


def test_the_script_is_bash_and_says_what_slurm_is_asked_for(tmp_path: Path) -> None:
    script = slurm_script(
        plan_of(tmp_path, name="wiki", gpus=8), time="2-00:00:00", options=["--partition=gpu"]
    )
    path = tmp_path / "job.sbatch"
    path.write_text(script)
    subprocess.run(["bash", "-n", str(path)], check=True)
    for line in (
        "--job-name=wiki", "--nodes=2", "--gpus-per-node=8", "--time=2-00:00:00",
        "--signal=B:USR1@180", "--requeue", "--partition=gpu",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"time": "tomorrow"}, "time 'tomorrow'"),
        ({"options": ["-p gpu; rm"]}, "option '-p gpu; rm'"),
        ({"warn_s": 30}, "would come too late"),
    ],
)
def test_what_sbatch_would_not_take_is_refused(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(LaunchError, match=says):
        slurm_script(plan_of(tmp_path), **options)


# --- Kubernetes -----------------------------------------------------------------------------------


def manifests(plan: LaunchPlan, **options: Any) -> list[dict[str, Any]]:
    given = {"image": "registry/pluglm:1", "memory": "64Gi", "claim": "shared", **options}
    return list(yaml.safe_load_all(kuberay_manifests(plan, **given)))


def test_a_job_brings_its_cluster_its_configuration_and_a_token(tmp_path: Path) -> None:
    config_map, job = manifests(plan_of(tmp_path, gpus=4, name="wiki"))
    assert config_from_mapping(__import__("tomllib").loads(config_map["data"]["config.toml"]))
    spec = job["spec"]
    assert job["kind"] == "RayJob"
    assert spec["entrypoint"].split()[-2:] == ["cluster.address=auto", "--auto-resume"]
    assert spec["backoffLimit"] == 3
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > 60
    assert {v["name"] for v in workers["template"]["spec"]["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }


def test_a_cluster_alone_has_no_job(tmp_path: Path) -> None:
    _, cluster = manifests(plan_of(tmp_path), job=False)
    assert cluster["kind"] == "RayCluster"
    assert "entrypoint" not in cluster["spec"]


def test_directories_that_pods_do_not_share_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="must lie below /mnt"):
        manifests(plan_of(tmp_path), mount="/mnt")
    climbing = config_of(run={"dir": "/data/../etc"})
    with pytest.raises(LaunchError, match="must lie below /data"):
        manifests(plan_of(tmp_path, climbing))
    with pytest.raises(LaunchError, match="give an image"):
        manifests(plan_of(tmp_path), image=" ")


@pytest.mark.skipif(not CRDS, reason="PLUGLM_KUBERAY_CRDS names no directory of KubeRay's CRDs")
@pytest.mark.parametrize("job", [True, False])
def test_manifests_fit_the_operators_schema(tmp_path: Path, job: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    made = manifests(plan_of(tmp_path, gpus=1), job=job)[1]
    file = Path(CRDS) / f"ray.io_{made['kind'].lower()}s.yaml"
    versions = yaml.safe_load(file.read_text())["spec"]["versions"]
    schema = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    jsonschema.validate(made, _strict(schema))


def _strict(schema: Any) -> Any:
    """Kubernetes drops fields that it does not know; here they are an error."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: _strict(value) for key, value in schema.items()}
    if schema.get("type") == "object" and schema.get("properties") and schema != "metadata":
        strict.setdefault("additionalProperties", False)
    return strict


# --- command lines --------------------------------------------------------------------------------


def test_a_job_for_a_cluster_that_is_up(tmp_path: Path) -> None:
    command = ray_job_command(
        plan_of(tmp_path, overrides=["optim.lr=1e-4"]), address="http://h:8265"
    )
    words = shlex.split(command)
    assert words[:5] == ["ray", "job", "submit", "--address", "http://h:8265"]
    environment = words[words.index("--runtime-env-json") + 1]
    assert json.loads(environment) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}
    inside = shlex.split(words[-1])
    assert inside[:3] == ["cd", str(tmp_path), "&&"]
    assert inside[3:5] == ["pluglm", "pretrain"]
    assert inside[-3:] == ["optim.lr=1e-4", "cluster.address=auto", "--auto-resume"]
    with pytest.raises(LaunchError, match="give the dashboard's"):
        ray_job_command(plan_of(tmp_path), address="h:6379")


def test_torchrun_needs_a_server_and_a_place_to_meet(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"memory\.server=NAME"):
        torchrun_command(plan_of(tmp_path), address="auto")
    served = config_of(memory={"server": "wiki"}, runtime={"trainers": 4})
    words = shlex.split(torchrun_command(plan_of(tmp_path, served, nodes=1), address="auto"))
    assert words[:4] == ["torchrun", "--nproc-per-node", "4", "--standalone"]
    assert words[-1] == "cluster.address=auto"
    with pytest.raises(LaunchError, match="address 'a b'"):
        torchrun_command(plan_of(tmp_path, served, nodes=1), address="a b")
    two = plan_of(tmp_path, served, nodes=2)
    with pytest.raises(LaunchError, match="rendezvous"):
        torchrun_command(two, address="auto")
    words = shlex.split(torchrun_command(two, address="auto", rendezvous="a:29500"))
    assert words[1:5] == ["--nproc-per-node", "2", "--nnodes", "2"]
    three = plan_of(tmp_path, served, nodes=3)
    with pytest.raises(LaunchError, match="multiple of the 3 nodes"):
        torchrun_command(three, address="auto", rendezvous="a:29500")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "Wiki run"}, "name 'Wiki run'"),
        ({"nodes": 1, "cpus": 1}, "needs 4 CPUs"),
        ({"setup": ["a\nb"]}, "one line at a time"),
        ({"gpus": -1}, "gpus -1: give 0 or more"),
    ],
)
def test_what_could_never_start_is_refused(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(LaunchError, match=says):
        plan_of(tmp_path, **options)
    with pytest.raises(LaunchError, match="are to have no GPU"):
        plan_of(tmp_path, config_of(runtime={"device": "cuda"}), gpus=0)


def test_the_command_writes_what_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = plan_of(tmp_path).config_path
    out = tmp_path / "first.sbatch"
    words = ["launch", "slurm", str(config), "--nodes", "2", "--cpus", "4", "--out", str(out)]
    assert main([*words, "--option=--partition=gpu", "optim.lr=0.5"]) == 0
    assert os.access(out, os.X_OK)
    assert "optim.lr=0.5" in out.read_text()
    assert main(["launch", "torchrun", str(config)]) == 1
    assert "memory.server=NAME" in capsys.readouterr().err
    words = ["launch", "kuberay", str(config), "--nodes", "2", "--image", "i", "--claim", "c"]
    assert main(words) == 0
    assert "kind: RayJob" in capsys.readouterr().out
