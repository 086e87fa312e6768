"""A build that is interrupted goes on and ends as if it had not been; a changed one is refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.trainer.corpus.samples import Build, contents, make_rows, write_json_lines
from trainer.corpus.build import build_corpus
from trainer.corpus.errors import CorpusError
from trainer.corpus.info import load_corpus_info
from trainer.corpus.progress import BuildProgress

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
from trainer.corpus.build import build_corpus
if __name__ == "__main__":
    build_corpus([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], documents_per_chunk=40,
                 heldout_fraction=0.2, workers=int(sys.argv[4]))
"""


class Interrupted(Exception):
    """Stands for whatever stops a build."""


def stop_after(stage: str, number: int) -> object:
    """A `progress` that raises at the n-th report of a stage."""
    seen = 0

    def report(progress: BuildProgress) -> None:
        nonlocal seen
        seen += progress.stage == stage
        if seen == number:
            raise Interrupted

    return report


STOPS = [("encoding", 1), ("encoding", 3), ("writing", 1), ("writing", 3)]


@pytest.mark.parametrize(
    ("tokenizer", "stage", "number"),
    [
        ("train:256", "counting", 1),
        *(("train:256", *stop) for stop in STOPS),
        *(("loaded", *stop) for stop in STOPS),
    ],
)
def test_interrupted_anywhere_it_ends_as_if_it_had_not_been(
    tmp_path: Path, build: Build, trained_tokenizer: str, tokenizer: str, stage: str, number: int
) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(90))
    arguments = {
        "documents_per_chunk": 20,
        "rows_per_file": 40,
        "tokenizer": trained_tokenizer if tokenizer == "loaded" else tokenizer,
    }
    whole = build(source, out=tmp_path / "whole", **arguments)
    with pytest.raises(Interrupted):
        build(source, out=tmp_path / "cut", progress=stop_after(stage, number), **arguments)
    with pytest.raises(CorpusError, match="half-built: run the same"):
        load_corpus_info(tmp_path / "cut")
    resumed = build(source, out=tmp_path / "cut", **arguments)
    assert contents(resumed.path) == contents(whole.path)


def test_finished_chunks_are_not_encoded_again(tmp_path: Path, build: Build) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(90))
    with pytest.raises(Interrupted):
        build(source, documents_per_chunk=20, progress=stop_after("encoding", 3))
    chunks = tmp_path / "corpus" / ".build" / "chunks"
    before = {path: path.stat().st_mtime_ns for path in chunks.rglob("*.arrow")}
    assert len(before) == 9
    with pytest.raises(Interrupted):
        build(source, documents_per_chunk=20, progress=stop_after("writing", 1))
    after = {path: path.stat().st_mtime_ns for path in chunks.rglob("*.arrow")}
    assert len(after) == 15
    assert before.items() <= after.items()


def test_a_torn_journal_and_leftovers_of_a_kill_do_no_harm(tmp_path: Path, build: Build) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(90))
    whole = build(source, documents_per_chunk=20, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        build(source, documents_per_chunk=20, progress=stop_after("encoding", 3))
    work = tmp_path / "corpus" / ".build"
    journal = work / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-15])  # killed while it wrote its third line
    left = work / "chunks" / f".tmp-00000003-{os.getpid()}"
    left.mkdir()
    (left / "entries.arrow").write_bytes(b"half")
    (work / ".tmp-tokenizer").mkdir()
    resumed = build(source, documents_per_chunk=20)
    assert contents(resumed.path) == contents(whole.path)
    assert not work.exists()


def test_a_finished_corpus_is_returned_without_reading_it_again(
    tmp_path: Path, build: Build
) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(30))
    first = build(source)
    stages: list[str] = []
    files = {path: path.stat().st_mtime_ns for path in first.path.rglob("*") if path.is_file()}
    again = build(source, progress=lambda report: stages.append(report.stage))
    assert again == first
    assert set(stages) == {"checking"}
    assert {path: path.stat().st_mtime_ns for path in files} == files
    os.utime(source)  # touched, with the same content
    assert build(source) == first


@pytest.mark.parametrize("finished", [False, True])
def test_other_arguments_or_files_are_refused_unless_overwritten(
    tmp_path: Path, build: Build, finished: bool
) -> None:
    rows = make_rows(60)
    source = write_json_lines(tmp_path / "a.jsonl", rows)
    if finished:
        build(source, documents_per_chunk=20)
    else:
        with pytest.raises(Interrupted):
            build(source, documents_per_chunk=20, progress=stop_after("encoding", 2))
    word = "built" if finished else "begun"
    with pytest.raises(
        CorpusError, match=rf"{word} .*entry_tokens was 64 and is now 32.*overwrite"
    ):
        build(source, documents_per_chunk=20, entry_tokens=32)
    with pytest.raises(CorpusError, match=r"tokenizer was 'fingerprint:.*now 'train:256'"):
        build(source, documents_per_chunk=20, tokenizer="train:256")
    other = write_json_lines(tmp_path / "b.jsonl", rows)
    with pytest.raises(CorpusError, match=r"sources was \['a.jsonl'\] and is now"):
        build([source, other], documents_per_chunk=20)
    write_json_lines(source, [*rows[:-1], dict(rows[-1], text="other words entirely")])
    with pytest.raises(CorpusError, match=r"the file a\.jsonl has changed"):
        build(source, documents_per_chunk=20)
    info = build(source, documents_per_chunk=20, entry_tokens=32, overwrite=True)
    assert info.entry_tokens == 32
    assert info == load_corpus_info(tmp_path / "corpus")


def test_a_directory_of_something_else_is_never_touched(tmp_path: Path, build: Build) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(5))
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    (home / "memory").mkdir()
    with pytest.raises(CorpusError, match=r"not empty and holds no corpus \(it has memory, thesis"):
        build(source, out=home)
    assert (home / "thesis.txt").read_text() == "precious"
    with pytest.raises(CorpusError, match="cannot write to"):
        build(source, out=home / "thesis.txt")


def start(source: Path, out: Path, tokenizer: str, workers: int) -> subprocess.Popen[bytes]:
    script = out.with_suffix(".py")
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(source), str(out), tokenizer, str(workers)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's background job, as tests may be, has its children ignore the interrupt.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_lines(journal: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} finished chunks; the build ended with {process.poll()}")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_killed_it_leaves_no_process_and_goes_on(
    tmp_path: Path, trained_tokenizer: str, ending: signal.Signals
) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(4000, longest=400))
    out = tmp_path / "cut"
    process = start(source, out, trained_tokenizer, 2)
    family: list[psutil.Process] = []
    try:
        wait_for_lines(out / ".build" / "journal.jsonl", 3, process)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        if ending == signal.SIGINT:
            os.killpg(process.pid, ending)  # as a terminal does
        else:
            process.send_signal(ending)
        assert process.wait(60) != 0
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    finally:
        process.kill()
        process.wait()
        for left in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    assert not (out / "corpus.json").exists()
    lines = (out / ".build" / "journal.jsonl").read_text().splitlines()
    assert 3 <= sum(bool(line) and "documents" in json.loads(line) for line in lines) < 50

    def finish(path: Path) -> dict[str, bytes]:
        arguments = {"tokenizer": trained_tokenizer, "heldout_fraction": 0.2}
        build_corpus([source], path, documents_per_chunk=40, workers=1, **arguments)
        return contents(path)

    assert finish(out) == finish(tmp_path / "whole")


def test_two_builds_do_not_write_one_directory(tmp_path: Path, trained_tokenizer: str) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(1500, longest=400))
    out = tmp_path / "out"
    process = start(source, out, trained_tokenizer, 1)
    try:
        wait_for_lines(out / ".build" / "journal.jsonl", 1, process)
        with pytest.raises(CorpusError, match="another build is writing"):
            build_corpus([source], out, tokenizer=trained_tokenizer, workers=1)
    finally:
        process.kill()
        process.wait()


def test_a_full_disk_is_said_and_the_build_goes_on_later(
    tmp_path: Path, trained_tokenizer: str, build: Build
) -> None:
    """No file may grow beyond a limit, as on a full disk; then the limit is gone."""
    source = write_json_lines(tmp_path / "a.jsonl", make_rows(200))
    limited = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n" + SCRIPT
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(source), str(tmp_path / "cut"), trained_tokenizer, "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "cannot write the corpus" in done.stderr.splitlines()[-1]
    resumed = build(source, documents_per_chunk=40, out=tmp_path / "cut")
    whole = build(source, documents_per_chunk=40, out=tmp_path / "whole")
    assert contents(resumed.path) == contents(whole.path)
