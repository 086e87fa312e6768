"""The table of the benchmarks, and running them one after the other, each in its own process."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import REPOSITORY, note

SUITE = Path(__file__).with_name("suite.toml")
SIZES = ("quick", "full")
NEEDS = ("gpu", "downloads", "run", "tuned")
BETTER = ("lower", "higher")
_TAIL = 5  # lines of a failed benchmark's output that are told


@dataclass(frozen=True, kw_only=True)
class RatioOf:
    """Which figures of a benchmark are ratios against a named peer; the fields are suite.toml's."""

    field: str
    against: str
    better: str
    rows: Sequence[str] = ()
    at: str = ""
    only: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.better not in BETTER:
            raise ValueError(f"better = {self.better!r}: allowed: {', '.join(BETTER)}")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One script: its arguments by size, what it needs, and its ratios."""

    name: str
    script: Path
    words: Mapping[str, str]
    needs: Sequence[str] = ()
    ratios: Sequence[RatioOf] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.needs) - set(NEEDS):
            raise ValueError(f"needs {', '.join(sorted(unknown))}: allowed: {', '.join(NEEDS)}")
        if not self.script.is_file():
            raise ValueError(f"there is no {self.script}")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a person has and allows: a GPU's name, downloads, a finished run and its corpus, a model
    that was fine-tuned and its test file."""

    gpu: str | None
    downloads: bool = False
    run: Path | None = None
    corpus: Path | None = None
    model: Path | None = None
    test: Path | None = None

    def lacks(self, benchmark: Benchmark) -> str | None:
        """Why a benchmark is left out; None where it can run."""
        if "gpu" in benchmark.needs and self.gpu is None:
            return "needs a GPU, and nvidia-smi names none"
        if "downloads" in benchmark.needs and not self.downloads:
            return "downloads packages: give --downloads"
        if "run" in benchmark.needs and (self.run is None or self.corpus is None):
            return "needs a finished run and its corpus: give --run and --corpus"
        if "tuned" in benchmark.needs and (self.model is None or self.test is None):
            return "needs a fine-tuned model and its test file: give --model and --test"
        return None


def read_suite(path: Path = SUITE) -> dict[str, Benchmark]:
    """The benchmarks by name, in the table's order; scripts lie beside the table.

    Raises:
        ValueError: there is no such file, or it says something that is not known.
    """
    try:
        whole = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    suite: dict[str, Benchmark] = {}
    for row in whole.get("benchmark", []):
        name = row.get("name", "(without a name)")
        try:
            one = _benchmark(dict(row), path.parent)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: benchmark {name}: {error}") from error
        if one.name in suite:
            raise ValueError(f"{path}: benchmark {name} is there twice")
        suite[one.name] = one
    if not suite:
        raise ValueError(f"{path}: has no [[benchmark]]")
    return suite


def chosen(suite: Mapping[str, Benchmark], size: str, only: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of a size, or of them those that are named.

    Raises:
        ValueError: a name is not one of that size.
    """
    names = [name for name, one in suite.items() if size in one.words]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"--only {' '.join(unknown)}: allowed at {size}: {', '.join(names)}")
    return [suite[name] for name in (only or names)]


def run_one(
    benchmark: Benchmark, size: str, folder: Path, choice: Choice, *, timeout_s: float | None
) -> str | None:
    """Run a benchmark; its figures go to NAME.json in the folder, its output to NAME.log.

    Returns:
        Why it failed, or None.
    """
    words = words_of(benchmark, size, folder, choice)
    raw, log = folder / f"{benchmark.name}.raw.json", folder / f"{benchmark.name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    raw.unlink(missing_ok=True)
    # A run that was broken off may have left half of it, which the scripts refuse to write into.
    shutil.rmtree(folder / f"{benchmark.name}.out", ignore_errors=True)
    command = [sys.executable, str(benchmark.script), *words, "--json", str(raw.resolve())]
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"took longer than {timeout_s:g} s; its output: {log}"
        except BaseException:
            _end(process)
            raise
    if code or not raw.is_file():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_TAIL:]
        return "\n".join([f"ended with {code}; its output: {log}", *last])
    whole = json.loads(raw.read_text(encoding="utf-8"))
    whole.update(words=words, seconds=round(time.monotonic() - began, 1))
    raw.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    # Moved last: a file of that name is a whole one.
    raw.replace(folder / f"{benchmark.name}.json")
    return None


def words_of(benchmark: Benchmark, size: str, folder: Path, choice: Choice) -> list[str]:
    """Its arguments, with what the placeholders stand for."""
    values = {"out": folder.resolve() / f"{benchmark.name}.out", "results": folder.resolve()}
    given = ("run", "corpus", "model", "test")
    values.update({name: path.resolve() for name in given if (path := getattr(choice, name))})
    return [word.format_map(values) for word in shlex.split(benchmark.words[size])]


def finished(folder: Path, name: str, words: Sequence[str]) -> dict[str, Any] | None:
    """What a benchmark left when it was last run with these arguments, or None."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    left: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return left if left.get("words") == list(words) else None


def run_each(
    benchmarks: Sequence[Benchmark],
    size: str,
    folder: Path,
    choice: Choice,
    *,
    again: bool,
    timeout_s: float | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str], dict[str, str]]:
    """Run what can run and is not finished, and go on when one fails.

    Returns:
        By name: what is finished, why others failed, and why others were left out.
    """
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    # Told to end, this process must end the benchmark, too, which leads a group of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for number, one in enumerate(benchmarks, 1):
        head = f"[{number}/{len(benchmarks)}] {one.name}"
        if reason := choice.lacks(one):
            left_out[one.name] = reason
            note(f"{head}: left out: {reason}")
            continue
        words = words_of(one, size, folder, choice)
        kept = None if again else finished(folder, one.name, words)
        if kept is not None:
            done[one.name] = kept
            note(f"{head}: finished at commit {kept['machine']['commit']}; --again runs it anew")
            continue
        note(f"{head}: running {shlex.join(words)}")
        if reason := run_one(one, size, folder, choice, timeout_s=timeout_s):
            failed[one.name] = reason
            note(f"{head}: FAILED: {reason}")
            continue
        left = finished(folder, one.name, words)
        assert left is not None
        done[one.name] = left
        note(f"{head}: {left['seconds']:.0f} s")
    return done, failed, left_out


def gpu_name() -> str | None:
    """What nvidia-smi calls the first GPU, or None where there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = told.stdout.strip().splitlines()
    return lines[0].strip() if lines else None


def _benchmark(row: dict[str, Any], folder: Path) -> Benchmark:
    name = row.pop("name")
    words = {size: row.pop(size) for size in SIZES if size in row}
    ratios = [RatioOf(**ratio) for ratio in row.pop("ratio", [])]
    needs = row.pop("needs", ())
    if row:
        allowed = ", ".join(["name", *SIZES, "needs", "ratio"])
        raise ValueError(f"unknown: {', '.join(row)}; allowed: {allowed}")
    return Benchmark(
        name=name, script=folder / f"{name}.py", words=words, needs=needs, ratios=ratios
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a benchmark and what it started; it leads a process group of its own."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
