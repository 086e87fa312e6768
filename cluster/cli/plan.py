"""`pluglm plan`: what a memory and its training would take, before any machine is rented."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from cluster.cli.command import Command, UsageError, count_of_entries, positive
from cluster.cli.memory_options import whole_number

LEAST_HOST_GIB = 0.1


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="CONFIG.toml key=value",
        help="a run's configuration and overrides, as for `pluglm pretrain`; without a "
        "configuration configs/pluglm-base-1b.toml, placed on the machines that are given",
    )
    what = parser.add_argument_group("what the memory holds (else as the corpus has it)")
    what.add_argument("--entries", type=count_of_entries, metavar="N", help="such as 1e9")
    what.add_argument("--entry-tokens", type=positive, metavar="S", help="of an entry (64)")
    what.add_argument(
        "--text-bytes", type=positive, metavar="B", help="of an entry's text (5 per token)"
    )
    what.add_argument("--vocabulary", type=positive, metavar="V", help="tokens (30522)")
    what.add_argument(
        "--sequence-tokens", type=positive, metavar="T", help="(default: model.max_positions)"
    )
    on = parser.add_argument_group("machines, all nodes alike")
    on.add_argument("--gpu", metavar="KIND", help="A100-40, A100-80, H100-80, H200, L4, ...")
    on.add_argument("--gpus", type=whole_number, metavar="N", help="in all (one node's)")
    on.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="(8)")
    on.add_argument("--nodes", type=positive, metavar="N", help="(as many as hold the GPUs)")
    on.add_argument("--host-gib", type=_gib, metavar="GIB", help="memory of a node (1024)")
    on.add_argument("--cores", type=positive, metavar="N", help="of a node (96)")
    on.add_argument(
        "--network-gbps", type=_above_0, default=100.0, metavar="G", help="Gbit/s of a node (100)"
    )
    on.add_argument(
        "--calibration",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.json",
        help="of a machine, by `pluglm calibrate --out`; one of a GPU and one of a CPU may be "
        "given, and stand for what is assumed else",
    )
    on.add_argument(
        "--price-per-gpu-hour", type=_above_0, metavar="P", help="of a node, where it has no GPU"
    )
    how = parser.add_argument_group("how they are used")
    how.add_argument(
        "--shards-on",
        choices=["gpu", "host"],
        help="place trainers and shards: half of the GPUs for either, or all for trainers",
    )
    how.add_argument("--trainers", type=positive, metavar="N", help="place so many")
    how.add_argument(
        "--step-s", type=_above_0, metavar="S", help="a step without its searches, as measured"
    )
    how.add_argument(
        "--local", action="store_true", help="a LocalMemory on a CPU, and nothing is trained"
    )
    how.add_argument(
        "--batch", type=positive, metavar="B", help="queries of a search with --local (64)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def _run(options: argparse.Namespace) -> int:
    from cluster.cli.plan_text import describe_plan, plan_as_json
    from cluster.planning.nearest import nearest
    from cluster.planning.plan import Plan, make_plan
    from cluster.planning.question import Options, ask
    from cluster.planning.wanted import Wanted

    configs = [word for word in options.words if "=" not in word]
    if len(configs) > 1:
        raise UsageError(f"{configs[1]}: give one CONFIG.toml, and overrides as key=value")
    if options.batch is not None and not options.local:
        raise UsageError(
            f"--batch {options.batch} is of --local; where there are trainers a search is as large "
            "as runtime.micro_batch_size=N says"
        )
    if options.local and (options.gpu is not None or options.gpus):
        raise UsageError("--local plans a memory on a CPU: leave --gpu and --gpus out")
    question = ask(
        Options(
            config=Path(configs[0]) if configs else None,
            overrides=tuple(word for word in options.words if "=" in word),
            entries=options.entries,
            entry_tokens=options.entry_tokens,
            text_bytes=options.text_bytes,
            vocabulary=options.vocabulary,
            sequence_tokens=options.sequence_tokens,
            gpu=options.gpu,
            gpus=options.gpus,
            gpus_per_node=options.gpus_per_node,
            nodes=options.nodes,
            host_gib=options.host_gib,
            cores=options.cores,
            network_gbps=options.network_gbps,
            shards_on=options.shards_on,
            trainers=options.trainers,
            step_s=options.step_s,
            local=options.local,
            calibrations=tuple(options.calibration),
        )
    )

    def reckon(wanted: Wanted) -> Plan:
        return make_plan(
            wanted,
            gpu=question.gpu,
            host=question.host,
            price=options.price_per_gpu_hour,
            batch=(options.batch or 64) if options.local else None,
        )

    plan = reckon(question.wanted)
    proposals = [] if plan.fits else nearest(question.wanted, reckon)
    if options.json:
        print(json.dumps(plan_as_json(plan, proposals), indent=1))
    else:
        print(describe_plan(plan, proposals))
    return 0 if plan.fits else 1


def _above_0(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _gib(text: str) -> float:
    number = _above_0(text)
    if number < LEAST_HOST_GIB:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of at least {LEAST_HOST_GIB} (GiB)"
        )
    return number


PLAN = Command(
    name="plan",
    summary="tell what a memory and its training would take on which machines",
    description="""\
Reckon, without any machine but this one, what a memory of so many entries takes: memory
of each GPU, node and disk by part, the time of searches, steps and refreshes, the price,
and what is the bottleneck. What does not fit is refused (exit code 1) with the nearest
plans that do. Without --calibration GPUs are as their data sheets say, times assumed
efficiencies: the bytes are as the code stores them, the seconds are estimates.""",
    example="""\
pluglm plan --entries 1e9 --gpu H100-80 --gpus 64 --price-per-gpu-hour 2.5
pluglm plan configs/pluglm-base.toml --entries 2e7 --calibration machine.json memory.shards=4
pluglm plan --local --entries 1e6 --calibration machine.json --batch 32 memory.key_dtype=int8""",
    configure=_arguments,
    run=_run,
)
