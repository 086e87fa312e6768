"""The run's record: one JSON line per event in ``metrics.jsonl``, mirrored to wandb when asked.

The file is the truth and wandb a mirror of it. A line reaches the operating system before
``write`` returns, so a killed process loses at most the line that it was writing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from trainer.metrics_lines import (
    drop_half_line,
    encode_lines,
    last_time,
    plain_value,
    read_metrics,
)

if TYPE_CHECKING:
    from wandb import Run

METRICS_FILE = "metrics.jsonl"
SUPERSEDED_FILE = "metrics.superseded.jsonl"
WANDB_ID_FILE = "wandb_run_id.txt"
WANDB_MODES = ("disabled", "offline", "online")

WandbMode = Literal["disabled", "offline", "online"]

__all__ = ["METRICS_FILE", "MetricsWriter", "WandbMode", "read_metrics"]

log = logging.getLogger(__name__)


class MetricsWriter:
    """Append-only metrics of one run; only rank 0 owns one.

    A line is ``{"kind", "step", "time_s", ...numbers}``. ``time_s`` is the seconds that the run
    has been training: it goes on from the last line after a resume, and a caller's own wins.
    JSON knows no NaN or infinity, so such a number is written as ``null`` and named under
    ``"non_finite"``: ``{"loss": null, "non_finite": {"loss": "nan"}}``.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        wandb: WandbMode = "disabled",
        wandb_project: str = "pluglm",
        config: Mapping[str, object],
        run_name: str,
        resume: bool,
    ) -> None:
        """Open the run's record.

        Args:
            run_dir: the run directory; made when missing.
            wandb: ``offline`` writes wandb's own files under ``run_dir/wandb`` and needs neither
                an account nor a network; ``online`` needs ``wandb login`` or WANDB_API_KEY.
            wandb_project: the wandb project's name.
            config: the resolved config, shown by wandb beside the curves.
            run_name: the run's name in wandb.
            resume: go on with the metrics that are there, dropping a half-written last line.

        Raises:
            ValueError: an unknown wandb mode, or wandb cannot start (not installed, no account).
            FileExistsError: metrics are there already and ``resume`` is false.
        """
        if wandb not in WANDB_MODES:
            raise ValueError(f"wandb is {wandb!r}; allowed: {', '.join(WANDB_MODES)}")
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before: list[dict[str, Any]] = []
        if self.path.exists() and self.path.stat().st_size > 0:
            if not resume:
                raise FileExistsError(
                    f"{self.path} already holds the metrics of a run; "
                    "resume that run or choose another run directory"
                )
            drop_half_line(self.path)
            before = read_metrics(self.path)
        self._start = time.monotonic() - last_time(before)
        self._file = self.path.open("ab", buffering=0)
        self._run: Run | None = None
        if wandb != "disabled":
            try:
                self._run = _start_wandb(
                    self.path.parent, wandb, wandb_project, _scrub(config), run_name, resume
                )
            except BaseException:
                self._file.close()
                raise

    def write(self, kind: str, step: int, **numbers: object) -> None:
        """Append one line and hand it to wandb.

        Args:
            kind: ``train``, ``refresh``, ``checkpoint``, ``eval`` or ``event``.
            step: the optimizer step that the line belongs to.
            **numbers: numbers, strings, booleans, None, or mappings and sequences of these. A
                0-dimensional tensor is read here, which waits for its device: average on the
                device with `RunningMeans` and write its means.

        Raises:
            OSError: the disk refused the line; the file is left as it was before.
            TypeError: a value that is none of the above.
            ValueError: the writer is closed.
        """
        if self._file.closed:
            raise ValueError(f"metrics of step {step}: {self.path} is closed")
        non_finite: dict[str, str] = {}
        line: dict[str, Any] = {"kind": kind, "step": int(step)}
        line["time_s"] = round(time.monotonic() - self._start, 3)
        for name, value in numbers.items():
            line[name] = plain_value(value, name, non_finite)
        if non_finite:
            line["non_finite"] = non_finite
        line = _scrub(line)
        self._append(encode_lines([line]))
        if self._run is not None:
            self._run.log(_flat(line))

    def truncate_after(self, step: int) -> int:
        """Move the lines of later steps aside, so that a resumed curve has no step twice.

        They go to ``metrics.superseded.jsonl``: nothing measured is lost. The rewrite is by
        rename; a crash in between leaves the old file whole.

        Returns:
            How many lines were moved.
        """
        lines = read_metrics(self.path)
        later = [line for line in lines if line["step"] > step]
        if not later:
            return 0
        kept = [line for line in lines if line["step"] <= step]
        with (self.path.parent / SUPERSEDED_FILE).open("ab") as aside:
            aside.write(encode_lines(later))
            aside.flush()
            os.fsync(aside.fileno())
        draft = self.path.with_suffix(".jsonl.tmp")
        with draft.open("wb") as file:
            file.write(encode_lines(kept))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)
        self._file.close()
        self._file = self.path.open("ab", buffering=0)
        self._start = time.monotonic() - last_time(kept)
        log.info("moved %d metrics lines after step %d to %s", len(later), step, SUPERSEDED_FILE)
        return len(later)

    def close(self) -> None:
        """Close the file and finish wandb's run; waits for its upload when online."""
        if self._file.closed:
            return
        self._file.close()
        if self._run is not None:
            self._run.finish()
            self._run = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, data: bytes) -> None:
        whole = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            # A full disk may have taken half the line; the next one must not be glued to it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), whole)
            raise


def _scrub(value: Any) -> Any:
    """Replace wandb's key wherever it occurs: a run directory is meant to be shared."""
    secret = os.environ.get("WANDB_API_KEY", "")
    if len(secret) < 8:  # unset, or a placeholder: wandb's keys have 40 characters and more
        return value
    if isinstance(value, str):
        return value.replace(secret, "[secret removed]")
    if isinstance(value, Mapping):
        return {_scrub(k): _scrub(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub(v) for v in value]
    return value


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """``{"kind": "train", "loss": 1}`` as wandb's ``{"train/loss": 1}``, beside the step."""
    kind = line["kind"]
    rest = {f"{kind}/{k}": v for k, v in line.items() if k not in ("kind", "step")}
    return {"step": line["step"], **{k: v for k, v in rest.items() if v is not None}}


def _start_wandb(
    run_dir: Path,
    mode: Literal["offline", "online"],
    project: str,
    config: Mapping[str, object],
    name: str,
    resume: bool,
) -> Run:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"wandb is {mode!r} but not installed ({error}); install it or set it to 'disabled'"
        ) from None
    id_file = run_dir / WANDB_ID_FILE
    known = id_file.read_text().strip() if resume and id_file.exists() else ""
    run_id = known or token_hex(4)
    # Our lines and progress bar are ours to print; a user's code and git diff stay here.
    settings = wandb.Settings(console="off", silent=True, save_code=False, disable_git=True)
    try:
        run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow" if known and mode == "online" else None,
            mode=mode,
            dir=str(run_dir),
            config=dict(config),
            settings=settings,
        )
    except wandb.Error as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"wandb {mode} could not start: {reason}; run 'wandb login', or set wandb to 'offline'"
        ) from None
    id_file.write_text(run_id + "\n")
    # A step of our own: wandb refuses its built-in one to go back after a resume.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
