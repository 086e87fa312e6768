"""The run's record: what survives a crash, a resume and a full disk, and what wandb gets."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.metrics import MetricsWriter, read_metrics


def make(run_dir: Path, resume: bool = False, **options: Any) -> MetricsWriter:
    return MetricsWriter(
        run_dir, config={"train": {"steps": 10}}, run_name="test", resume=resume, **options
    )


def test_a_line_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    with make(tmp_path) as writer:
        writer.write("train", 1, loss=2.5, memory_bytes={"keys": 8}, path=Path("a/b"))
        (line,) = (json.loads(t) for t in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line.pop("time_s") >= 0
    assert line == {
        "kind": "train",
        "step": 1,
        "loss": 2.5,
        "memory_bytes": {"keys": 8},
        "path": "a/b",
    }


def test_numbers_that_json_lacks_are_null_and_named(tmp_path: Path) -> None:
    with make(tmp_path) as writer:
        writer.write(
            "train",
            1,
            loss=float("nan"),
            grad_norm=torch.tensor(float("inf")),
            parts=[1.0, -np.inf],
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert line["parts"] == [1.0, None]
    assert line["non_finite"] == {"loss": "nan", "grad_norm": "inf", "parts.1": "-inf"}


def test_scalars_of_torch_and_numpy_are_numbers(tmp_path: Path) -> None:
    with make(tmp_path) as writer:
        writer.write("train", 3, a=torch.tensor(1.5), b=np.float32(0.5), c=np.bool_(True))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["step"], line["a"], line["b"], line["c"]) == (3, 1.5, 0.5, True)


def test_a_value_that_is_no_metric_is_refused_by_name_and_writes_nothing(tmp_path: Path) -> None:
    with make(tmp_path) as writer, pytest.raises(TypeError, match=r"'loss' is Tensor"):
        writer.write("train", 1, loss=torch.zeros(2))
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_metrics_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    make(tmp_path).close()
    with make(tmp_path) as writer:  # an empty file is no run
        writer.write("train", 1)
    with pytest.raises(FileExistsError, match="already holds"):
        make(tmp_path)


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b"\0\0\0\0", b"{"])
def test_resume_drops_a_half_written_last_line(tmp_path: Path, torn: bytes) -> None:
    with make(tmp_path) as writer:
        writer.write("train", 1, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(torn)
    assert [line["step"] for line in read_metrics(path)] == [1]
    with make(tmp_path, resume=True) as writer:
        writer.write("train", 2, loss=1.0)
    assert [json.loads(text)["step"] for text in path.read_text().splitlines()] == [1, 2]


def test_resume_keeps_a_whole_last_line_that_lacks_its_newline(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}')
    with make(tmp_path, resume=True) as writer:
        writer.write("train", 2)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind"\n{"kind": "train", "step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_metrics(path)


def test_truncate_moves_later_lines_aside_and_writing_goes_on(tmp_path: Path) -> None:
    with make(tmp_path) as writer:
        for step in range(1, 6):
            writer.write("train", step, loss=float(step), time_s=10.0 * step)
        writer.write("refresh", 4, epoch=2, time_s=45.0)
    with make(tmp_path, resume=True) as writer:
        assert writer.truncate_after(3) == 3
        assert writer.truncate_after(3) == 0
        writer.write("train", 4, loss=-4.0)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [("train", s) for s in (1, 2, 3, 4)]
    assert lines[-1]["loss"] == -4.0
    assert 30.0 <= lines[-1]["time_s"] < 40.0  # goes on from the last line that was kept
    aside = read_metrics(tmp_path / "metrics.superseded.jsonl")
    assert [(line["kind"], line["step"]) for line in aside] == [
        ("train", 4),
        ("train", 5),
        ("refresh", 4),
    ]


def test_a_full_disk_leaves_the_lines_before_whole(tmp_path: Path) -> None:
    writer = make(tmp_path)
    writer.write("train", 1, loss=1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.write("train", 2, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    writer.write("train", 3, loss=1.0)
    writer.close()
    lines = writer.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_a_closed_writer_says_so(tmp_path: Path) -> None:
    writer = make(tmp_path)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.write("train", 1)


def test_an_unknown_wandb_mode_names_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="disabled, offline, online"):
        make(tmp_path, wandb="on")


def test_disabled_never_imports_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from trainer.metrics import MetricsWriter\n"
        "w = MetricsWriter(sys.argv[1], config={}, run_name='r', resume=False)\n"
        "w.write('train', 1, loss=1.0); w.close()\n"
        "sys.exit('wandb' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_wandb_offline_needs_no_account_and_leaks_no_key(tmp_path: Path) -> None:
    """The real wandb, in a process of its own, with a key that must not reach any file."""
    code = (
        "import os, sys; from trainer.metrics import MetricsWriter\n"
        "def make(resume): return MetricsWriter(sys.argv[1], wandb='offline', wandb_project='p',"
        " config={'note': os.environ['WANDB_API_KEY']}, run_name='r', resume=resume)\n"
        "with make(False) as w:\n"
        "    w.write('train', 1, loss=1.25, memory_bytes={'keys': 3})\n"
        "    w.write('event', 2, message='key ' + os.environ['WANDB_API_KEY'])\n"
        "with make(True) as w:\n"
        "    w.truncate_after(1); w.write('train', 2, loss=1.0)\n"
    )
    secret = "0123456789abcdef0123456789abcdef01234567"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("WANDB_")},
        "WANDB_API_KEY": secret,
        "HOME": str(tmp_path / "home"),
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # nothing listens: offline must not ask
    }
    run_dir = tmp_path / "run"
    subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], check=True, timeout=120, env=environment
    )
    mirrors = list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(mirrors) == 2
    assert any(b"train/loss" in mirror.read_bytes() for mirror in mirrors)
    run_id = (run_dir / "wandb_run_id.txt").read_text().strip()
    assert all(mirror.name == f"run-{run_id}.wandb" for mirror in mirrors)  # one run, resumed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
