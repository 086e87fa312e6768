"""`pluglm launch slurm|kuberay|ray-job|torchrun`: what starts a run on a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, positive

if TYPE_CHECKING:
    from cluster.launch.plan import LaunchPlan


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="the run's configuration")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as for `pluglm pretrain`"
    )
    parser.add_argument("--name", default="pluglm", metavar="NAME", help="of the job")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="how many")
    parser.add_argument("--cpus", type=positive, default=8, metavar="N", help="of each node")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="of each node")
    parser.add_argument(
        "--directory",
        type=Path,
        default=None,
        metavar="DIR",
        help="where the command runs on every node (default: here)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write it there instead of printing it"
    )


def _plan(options: argparse.Namespace) -> LaunchPlan:
    from cluster.config import load_config
    from cluster.launch.plan import LaunchPlan

    return LaunchPlan(
        config=load_config(options.config, options.overrides),
        config_path=options.config.resolve(),
        overrides=options.overrides,
        name=options.name,
        nodes=options.nodes,
        cpus=options.cpus,
        gpus=options.gpus,
        directory=(options.directory or Path.cwd()).resolve(),
        setup=getattr(options, "setup", None) or (),
    )


def _give(options: argparse.Namespace, text: str, *, executable: bool = False) -> int:
    if options.out is None:
        print(text, end="" if text.endswith("\n") else "\n")
        return 0
    options.out.write_text(text, encoding="utf-8")
    if executable:
        options.out.chmod(0o755)
    print(f"written: {options.out}")
    return 0


def _slurm_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--time", default="24:00:00", metavar="T", help="limit of the job")
    parser.add_argument(
        "--warn", type=positive, default=180, metavar="S",
        help="seconds before the limit at which the run writes its checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--setup", action="append", metavar="LINE",
        help='shell line that makes pluglm available, such as "source .venv/bin/activate"',
    )  # fmt: skip
    parser.add_argument(
        "--option", action="append", default=[], metavar="O",
        help='more of sbatch\'s, such as --option=--partition=gpu',
    )  # fmt: skip


def _slurm(options: argparse.Namespace) -> int:
    from cluster.launch.slurm import slurm_script

    script = slurm_script(
        _plan(options), time=options.time, warn_s=options.warn, options=options.option
    )
    return _give(options, script, executable=True)


def _kuberay_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--image", required=True, metavar="IMAGE", help="with this project in it")
    parser.add_argument("--claim", required=True, metavar="PVC", help="that all pods can write to")
    parser.add_argument("--mount", default="/data", metavar="DIR", help="where it is mounted")
    parser.add_argument("--memory", default="64Gi", metavar="M", help="of each pod")
    parser.add_argument("--namespace", default="default", metavar="NS", help="of Kubernetes")
    parser.add_argument(
        "--retries", type=int, default=3, metavar="N", help="times that the job is started again"
    )
    parser.add_argument(
        "--cluster-only", action="store_true", help="a RayCluster that stays, without a job"
    )


def _kuberay(options: argparse.Namespace) -> int:
    from cluster.launch.kuberay import kuberay_manifests

    return _give(
        options,
        kuberay_manifests(
            _plan(options),
            image=options.image,
            memory=options.memory,
            claim=options.claim,
            mount=options.mount,
            namespace=options.namespace,
            job=not options.cluster_only,
            retries=options.retries,
        ),
    )


def _ray_job_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument(
        "--address", required=True, metavar="URL", help="of Ray's dashboard, http://head:8265"
    )


def _ray_job(options: argparse.Namespace) -> int:
    from cluster.launch.commands import ray_job_command

    return _give(options, ray_job_command(_plan(options), address=options.address))


def _torchrun_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument(
        "--address", default="auto", metavar="A", help="of the Ray in which the server runs"
    )
    parser.add_argument(
        "--rendezvous", default="", metavar="HOST:PORT", help="where several nodes meet"
    )


def _torchrun(options: argparse.Namespace) -> int:
    from cluster.launch.commands import torchrun_command

    command = torchrun_command(
        _plan(options), address=options.address, rendezvous=options.rendezvous
    )
    return _give(options, command)


COMMANDS = (
    Command(
        name="launch slurm",
        summary="a batch script for Slurm: its own Ray, checkpoint and requeue before time is over",
        description="""\
Print a script for sbatch: it starts a Ray with a token of its own on the job's nodes, has
`pluglm doctor` look them over, and runs `pluglm pretrain --auto-resume`. Before the time
limit, or when Slurm takes the nodes away, the run writes a checkpoint and the job is queued
again, as often as it takes.""",
        example="pluglm launch slurm configs/pluglm-base.toml data.corpus=/data/wiki "
        "run.dir=/data/runs/first --nodes 4 --cpus 32 --gpus 8 --option=--partition=gpu "
        "--out first.sbatch",
        configure=_slurm_arguments,
        run=_slurm,
    ),
    Command(
        name="launch kuberay",
        summary="manifests for KubeRay: a RayJob with its cluster, or a RayCluster",
        description="""\
Print a ConfigMap with the run's configuration and a RayJob (or, with --cluster-only, a
RayCluster) for the KubeRay operator 1.6 or newer. Token authentication is on. Corpus, store and
run directory lie on a claim that all pods can write to. If the head's pod is taken away, the run
is told before and given time for a checkpoint; a lost worker costs the steps since the last one.
The job is started again --retries times and goes on.""",
        example="pluglm launch kuberay configs/pluglm-base.toml data.corpus=/data/wiki "
        "run.dir=/data/runs/first --image registry/pluglm:1 --claim shared --nodes 2 --cpus 16 "
        "--gpus 8 --out first.yaml",
        configure=_kuberay_arguments,
        run=_kuberay,
    ),
    Command(
        name="launch ray-job",
        summary="the command that submits a run to a Ray cluster",
        description="""\
Print `ray job submit` of the run for a Ray cluster that is up, with --auto-resume. The directory
and the configuration's file must be there on the cluster's head, at these paths.""",
        example="pluglm launch ray-job configs/pluglm-base.toml data.corpus=/data/wiki "
        "run.dir=/data/runs/first --address http://head:8265 --nodes 4 --cpus 32 --gpus 8",
        configure=_ray_job_arguments,
        run=_ray_job,
    ),
    Command(
        name="launch torchrun",
        summary="the command that starts trainers with torchrun beside a memory server",
        description="""\
Print `torchrun` of the trainers alone; the memory is a server that runs (`pluglm memory serve`).
Run it on every node. Started again, the same command goes on from the newest checkpoint.""",
        example="pluglm launch torchrun configs/quickstart.toml data.corpus=corpora/mine "
        "memory.server=wiki run.dir=runs/second",
        configure=_torchrun_arguments,
        run=_torchrun,
    ),
)
