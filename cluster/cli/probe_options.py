"""What `pluglm probe` and `pluglm update` share: the model, the memory, the probes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.command import UsageError, positive
from cluster.cli.memory_options import STORE_HELP, add_json, place, some_path

if TYPE_CHECKING:
    from cluster.probes.reading import Columns, Fitted, Prompt
    from cluster.trained_model import TrainedModel
    from memory_server.store.store import Store

PROBES_HELP = """\
PROBES is a file in LAMA's format (.jsonl, .csv, .tsv or .parquet): the columns sub and
obj, and a `template` with [X] and [Y] or a `masked_sentence` with [MASK]; relation, if
there is one, groups the figures."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """The model, the memory, the probes and how they are asked."""
    parser.add_argument("store", type=place, metavar="STORE|RUN_DIR", help=STORE_HELP)
    parser.add_argument("probes", type=some_path, metavar="PROBES", help="a file of facts")
    parser.add_argument(
        "--model", type=some_path, metavar="DIR", help="the model (default: the run's own)"
    )
    parser.add_argument(
        "-k",
        type=positive,
        metavar="K",
        help="entries that each layer reads (default: the model's own)",
    )
    parser.add_argument(
        "--prompt",
        choices=("template", "sentence"),
        help="ask with this (default: the template where there is one)",
    )
    parser.add_argument(
        "--known", metavar="COLUMN", help="column that says whether the memory can know the fact"
    )
    parser.add_argument(
        "--known-by-memory",
        action="store_true",
        help="the memory can know a fact if an entry holds its subject and its object",
    )
    parser.add_argument(
        "--answers",
        type=some_path,
        metavar="FILE",
        help="answer only with these words, one a line (default: the whole vocabulary)",
    )
    parser.add_argument(
        "--skip-unfit",
        action="store_true",
        help="leave out and count probes that cannot be asked, such as objects of several tokens",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: a GPU if there is one)",
    )
    add_json(parser)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What both commands work on; `candidates`: tokens that may be answered, None: all."""

    trained: TrainedModel
    store: Store
    k: int
    candidates: frozenset[int] | None

    def fitted(
        self, path: Path, *, prompt: Prompt | None, columns: Columns, skip_unfit: bool
    ) -> Fitted:
        """A file of probes as this model takes them; tells on stderr what is left out."""
        from cluster.probes.reading import fit, read_probes
        from cluster.probes.shown import describe_fit

        probes = read_probes(path, prompt=prompt, columns=columns)
        fitted = fit(self.trained, probes, skip_unfit=skip_unfit, allowed=self.candidates)
        say(f"{path}: {describe_fit(fitted)}")
        return fitted


def asked(options: argparse.Namespace) -> Asked:
    """Open what the options of `add_common` name.

    Raises:
        UsageError: no model is given, two options say what the memory can know, or k is too large.
    """
    from cluster.probes.candidates import answer_tokens, read_answers
    from memory_server.requests import MAX_TOP_K

    if options.known is not None and options.known_by_memory:
        raise UsageError("--known and --known-by-memory say the same in two ways; give one")
    if options.k is not None and options.k > MAX_TOP_K:
        raise UsageError(f"-k {options.k}: at most {MAX_TOP_K} entries can be read")
    answers = None if options.answers is None else read_answers(options.answers)
    trained, store = _opened(options)
    candidates = None
    if answers is not None:
        candidates, left_out = answer_tokens(trained, answers, skip_unfit=options.skip_unfit)
        if left_out:
            say(f"{options.answers}: {left_out:,} answers are not one token and are left out")
    k = trained.model.config.top_k if options.k is None else options.k
    return Asked(trained=trained, store=store, k=k, candidates=candidates)


def say(line: str) -> None:
    """Tell a person what is going on."""
    print(line, file=sys.stderr, flush=True)


def _opened(options: argparse.Namespace) -> tuple[TrainedModel, Store]:
    from cluster.cli.memory_options import opened_store
    from cluster.cli.places import is_run, run_model
    from cluster.memory_tools import chosen_device
    from cluster.trained_model import load_trained_model

    model = options.model
    if model is None:
        if "://" in options.store or not is_run(Path(options.store)):
            raise UsageError(f"{options.store} is no run directory, so --model is needed")
        model = run_model(Path(options.store))
    store = opened_store(options.store)
    trained = load_trained_model(model, device=chosen_device(options.device))
    trained.check_fits(store)
    return trained, store
