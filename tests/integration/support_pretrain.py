"""Run `pluglm pretrain` as a person does, on a tiny corpus, and know every process it started."""

from __future__ import annotations

import ctypes
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from trainer.corpus.build import build_corpus

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "import sys; from cluster.cli import main; sys.exit(main())"]
SEQUENCE_TOKENS, ENTRY_TOKENS = 33, 17
START_S = 400.0  # for a machine that is busy with other things

CONFIG = """
[run]
dir = "{run_dir}"
[data]
corpus = "{corpus}"
[model]
hidden_size = 32
num_layers = 2
num_heads = 2
intermediate_size = 64
max_positions = 33
memory_ffn_size = 32
key_size = 16
dropout = 0.1
[optim]
steps = 12
batch_size = 8
retrieval_warmup_steps = 1000
[memory]
shards = 2
top_k = 3
refresh_every_steps = 4
[runtime]
trainers = 2
device = "cpu"
[checkpoint]
every_steps = 5
keep = 2
[logging]
log_every_steps = 1
progress = false
[evaluate]
sequences = 16
samples = 2
"""


def make_corpus(home: Path, *, seed: int = 0, documents: int = 240) -> Path:
    """Build a corpus from invented text below `home`."""
    rng = random.Random(seed)
    people = ["Ada", "Boris", "Clara", "Dario", "Elena", "Farid", "Greta", "Hugo", "Ines"]
    rows = []
    for number in range(documents):
        who = rng.choice(people)
        sentences = [
            f"{who} met {rng.choice(people)} in town {rng.randint(0, 99)} "
            f"and paid {rng.randint(1, 99)} coins for tea."
            for _ in range(rng.randint(2, 5))
        ]
        rows.append(json.dumps({"title": f"{who} {number}", "text": " ".join(sentences)}))
    text = home / f"people-{seed}.jsonl"
    text.write_text("\n".join(rows), encoding="utf-8")
    info = build_corpus(
        [text],
        home / f"corpus-{seed}",
        tokenizer="train:400",
        sequence_length=SEQUENCE_TOKENS,
        entry_tokens=ENTRY_TOKENS,
        heldout_fraction=0.1,
        workers=1,
    )
    return info.path


def write_config(home: Path, corpus: Path, *, name: str = "run") -> Path:
    """A configuration whose run directory is `home/name`; returns its file."""
    path = home / f"{name}.toml"
    path.write_text(CONFIG.format(run_dir=home / name, corpus=corpus), encoding="utf-8")
    return path


def read_lines(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, of one kind or all; none while there is no file."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if kind in (None, line["kind"])]


def checkpoint_names(run_dir: Path) -> list[str]:
    """What lies in the checkpoints' directory, hidden names too."""
    folder = run_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@dataclass(frozen=True)
class Ended:
    """How the command ended, and which of its processes were still there some seconds later."""

    code: int
    stderr: str
    left_over: list[str]

    @property
    def error_line(self) -> str:
        """The one line that says what went wrong."""
        assert "Traceback" not in self.stderr, self.stderr
        (line,) = [ln for ln in self.stderr.splitlines() if ln.startswith("pluglm: error:")]
        return line


class Run:
    """`pluglm pretrain` in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], run_dir: Path, stderr: Path) -> None:
        self.process, self.run_dir, self._stderr = process, run_dir, stderr
        self._driver = psutil.Process(process.pid)
        self._seen: set[psutil.Process] = set()
        self._before = read_lines(run_dir)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The metrics that this process's trainers wrote; those of earlier ones are left out."""
        return [line for line in read_lines(self.run_dir, kind) if line not in self._before]

    def wait_until(self, happened: Callable[[], bool], *, what: str) -> None:
        """Poll; a run that ends or dawdles meanwhile fails the test with what it said."""
        deadline = time.monotonic() + START_S
        while not happened():
            self._look()
            assert self.process.poll() is None, f"ended before {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"too slow to reach {what}:\n{self.said()}"
            time.sleep(0.01)
        self._look()

    def wait_for_step(self, step: int) -> None:
        """Until this process's trainers have made this optimizer step."""
        self.wait_until(
            lambda: any(line["step"] >= step for line in self.lines("train")),
            what=f"step {step}",
        )

    def wait_for_checkpoint_after(self, step: int) -> None:
        """Until a checkpoint of a later step is committed."""
        self.wait_until(
            lambda: any(line["step"] > step for line in self.lines("checkpoint")),
            what=f"a checkpoint after step {step}",
        )

    def actors(self, kind: str) -> list[psutil.Process]:
        """Processes of the actors of a class, by its name."""
        self._look()
        return [p for p in self._seen if _title(p).startswith(f"ray::{kind}")]

    def trainer(self, *, rank_0: bool) -> psutil.Process:
        """The trainer that writes the metrics, or one that does not."""
        metrics = str(self.run_dir / "metrics.jsonl")
        trainers = self.actors("TrainerHost")
        assert len(trainers) == 2
        leads = {p: metrics in [file.path for file in p.open_files()] for p in trainers}
        return next(p for p, leading in leads.items() if leading == rank_0)

    def send(self, number: signal.Signals) -> None:
        """Signal the command's process alone, as `kill` does."""
        self.process.send_signal(number)

    def said(self) -> str:
        """What it wrote to standard error so far."""
        return self._stderr.read_text(encoding="utf-8", errors="replace")

    def end(self) -> Ended:
        """Wait for the command, then for its processes; what is left then is ended and named."""
        deadline = time.monotonic() + START_S
        while self.process.poll() is None:
            self._look()
            assert time.monotonic() < deadline, f"did not end:\n{self.said()}"
            time.sleep(0.05)
        # After a SIGKILL, Ray's two agents need a minute to notice that their Ray is gone.
        agents = self.actors("DashboardAgent") + self.actors("RuntimeEnvAgent")
        killed = self.process.returncode == -signal.SIGKILL
        watched = self._seen.difference(agents) if killed else self._seen
        _, alive = psutil.wait_procs(watched, timeout=20)
        left_over = [_title(process) for process in alive]
        self._kill_seen()
        return Ended(code=self.process.returncode, stderr=self.said(), left_over=left_over)

    def abort(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self.process.poll() is None:
            self._look()
            self.process.kill()
            self.process.wait()
        self._kill_seen()

    def _look(self) -> None:
        try:
            self._seen.update(self._driver.children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def _kill_seen(self) -> None:
        for process in self._seen:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(self._seen, timeout=20)


@contextmanager
def pretraining(config: Path, *words: str) -> Iterator[Run]:
    """Start `pluglm pretrain` in a process group of its own; it never outlives the block.

    Args:
        config: as `write_config` makes it, so that the run directory has its name.
        words: overrides and options.
    """
    run_dir = config.with_suffix("")
    stderr = config.with_name(f"{config.stem}-{time.monotonic_ns()}.stderr")
    with stderr.open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, "pretrain", str(config), *words],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
            preexec_fn=_end_with_the_tests,
        )
    run = Run(process, run_dir, stderr)
    try:
        yield run
    finally:
        run.abort()


def _end_with_the_tests() -> None:
    """Linux: SIGTERM when the tests' process dies without running its clean-up."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return "(gone)"
