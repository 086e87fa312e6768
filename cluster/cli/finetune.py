"""`pluglm finetune`: a task of one's own, over several seeds."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from cluster.cli.command import Command


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, metavar="TASK.toml", help="the task, as configs/finetune-*.toml"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="a setting that counts more than the file's, such as train.lr=1e-4; may be given "
        "again",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where everything is written, instead of run.dir"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on in a directory: finished seeds are kept, the others are trained",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check configuration, files, model, tokenizer and memory, and train nothing",
    )


def _run(options: argparse.Namespace) -> int:
    from cluster.finetune import (
        check_finetuning,
        load_finetune_config,
        results_table,
        run_finetuning,
    )

    config = load_finetune_config(options.config, options.set)
    if options.out is not None:
        config = replace(config, run=replace(config.run, dir=str(options.out)))
    if options.check:
        check_finetuning(config, say=print)
        print("everything fits")
        return 0
    results = run_finetuning(config, resume=options.resume, say=_say)
    if results is not None:
        print(results_table(results))
        print(f"\n{Path(config.run.dir) / 'results.json'}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


FINETUNE = Command(
    name="finetune",
    summary="fine-tune a model on a task, over several seeds",
    description="""\
Fine-tune a PlugLM, with a memory or without, or plain BERT as the baseline, on
a task's own files: classification of texts or pairs, regression, token
classification, or extractive question answering. The best epoch on dev is kept;
mean and deviation over the seeds go to results.json and are printed.

The same TASK.toml serves every model: only model.path changes.""",
    example="""\
pluglm finetune task.toml --check
pluglm finetune task.toml --set model.path=runs/first/model --set train.seeds=[0] --out runs/task
pluglm finetune task.toml --set model.path=bert-base --out runs/baseline
pluglm finetune task.toml --out runs/task --resume""",
    configure=_arguments,
    run=_run,
    after_interrupt="finished seeds are kept: --resume trains the others",
)
