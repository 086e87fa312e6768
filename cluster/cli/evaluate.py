"""`pluglm evaluate`: what the memory is worth on text that training never saw."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import Command, UsageError, domain_names, positive

if TYPE_CHECKING:
    from cluster.config import PretrainConfig


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        metavar="RUN_DIR",
        help="a finished run: its model, corpus, memory and masking are taken",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="evaluate this model")
    parser.add_argument("--corpus", metavar="DIR", help="held-out text of this corpus")
    parser.add_argument(
        "--store", metavar="DIR", help="with this memory (default: the run's or the corpus's own)"
    )
    parser.add_argument(
        "--domains",
        type=domain_names,
        default=(),
        metavar="A,B",
        help="read only the entries of these domains (default: of all that are plugged)",
    )
    parser.add_argument(
        "--sequences",
        type=positive,
        metavar="N",
        help="held-out sequences (default: the run's setting, else 256)",
    )
    parser.add_argument(
        "-k", type=positive, metavar="K", help="entries per sequence (default: as trained, else 5)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="another setting, such as data.salient_mask=0.5; may be given again",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="where to compute (default: as trained)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for other programs")


def _run(options: argparse.Namespace) -> int:
    config, model = _what(options)
    from cluster.evaluate import evaluate_model
    from trainer.evaluate import describe_evaluation

    evaluation = evaluate_model(
        config, model, domains=options.domains, say=lambda line: print(line, file=sys.stderr)
    )
    if options.json:
        print(json.dumps(evaluation, indent=1))
    else:
        print("\n".join(describe_evaluation(evaluation)))
    return 0


def _what(options: argparse.Namespace) -> tuple[PretrainConfig, Path]:
    """The settings and the model that the arguments name."""
    from cluster.cli.places import run_config, run_model, with_corpus
    from cluster.config import config_from_mapping

    given = {
        "data": {"corpus": options.corpus},
        "memory": {"store": options.store, "top_k": options.k},
        "evaluate": {"sequences": options.sequences},
        "runtime": {"device": options.device},
    }
    tree = {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in given.items()
    }
    if options.run is None:
        if options.model is None or options.corpus is None:
            raise UsageError(
                "give a RUN_DIR, or both --model and --corpus; see `pluglm evaluate --help`"
            )
        return config_from_mapping(tree, options.set), options.model
    run = run_config(options.run if options.corpus else with_corpus(options.run))
    model = run_model(options.run) if options.model is None else options.model
    return _changed(run, tree, options.set), model


def _changed(
    run: PretrainConfig, tree: dict[str, dict[str, object]], overrides: list[str]
) -> PretrainConfig:
    """A run's settings with those that the command line gave."""
    import tomllib

    from cluster.config import config_from_mapping

    whole = tomllib.loads(run.to_toml())
    if "corpus" in tree["data"]:
        # Another corpus comes with its own memory, unless one is given too.
        whole["memory"]["store"] = ""
    for section, values in tree.items():
        whole[section].update(values)
    return config_from_mapping(whole, overrides)


EVALUATE = Command(
    name="evaluate",
    summary="measure masked-LM loss with the memory, a shuffled one and none",
    description="""\
Measure masked-LM loss and accuracy on held-out text: with the entries that the model
finds, with those that it finds for other sentences, and with none. Where the memory
holds the text's own passages, once with them and once without.""",
    example="""\
pluglm evaluate runs/quickstart/run-seed0
pluglm evaluate runs/quickstart/run-seed0 --sequences 1000 -k 10 --json
pluglm evaluate runs/first --domains default,biomed
pluglm evaluate --model runs/first/model --corpus data/articles""",
    configure=_arguments,
    run=_run,
)
