"""From whatever went wrong to one line and an exit code."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from cluster.cli.command import UsageError
from cluster.errors import Interrupted, LaunchError
from memory_server.errors import (
    DomainPlugged,
    DuplicateEntry,
    MemoryServerError,
    StoreNotFound,
    TokenizerMismatch,
    UnknownDomain,
    UnknownEntry,
    UnknownVersion,
)
from trainer.errors import TrainingError

BAD_INPUT, FAILED, CTRL_C, TERMINATED = 2, 1, 130, 143
_OURS = ("cluster", "memory_server", "model", "trainer")
_BAD_INPUT = (
    StoreNotFound,
    UnknownVersion,
    TokenizerMismatch,
    UnknownEntry,
    DuplicateEntry,
    UnknownDomain,
    DomainPlugged,
)
_BAD_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as cleanly as Ctrl-C does."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What to tell, and the exit code that goes with it."""

    message: str
    code: int


def explain(error: BaseException) -> Failure:
    """Say in one line what went wrong."""
    error = _from_ray(error)
    if isinstance(error, Terminated):
        return Failure(message="ended by SIGTERM", code=TERMINATED)
    if isinstance(error, Interrupted):
        return Failure(message="interrupted", code=error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure(message="interrupted", code=CTRL_C)
    if isinstance(error, (UsageError, *_BAD_INPUT)):
        return Failure(message=_line(error), code=BAD_INPUT)
    if isinstance(error, MemoryServerError | TrainingError | LaunchError):
        return Failure(message=_line(error), code=FAILED)
    if isinstance(error, OSError):
        return Failure(
            message=_line(error), code=BAD_INPUT if isinstance(error, _BAD_PATH) else FAILED
        )
    if isinstance(error, ValueError) and (_ours(type(error).__module__) or _raised_by_us(error)):
        return Failure(message=_line(error), code=BAD_INPUT)
    told = f"{type(error).__name__}: {_line(error)}" if str(error).strip() else type(error).__name__
    return Failure(
        message=f"unexpected {told} (the same command with --traceback shows where)", code=FAILED
    )


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__


def _ours(module: str) -> bool:
    return module.split(".")[0] in _OURS


def _raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised it: a library's plain ValueError is a fault, not a refusal."""
    frame = error.__traceback__
    if frame is None:
        return False
    while frame.tb_next is not None:
        frame = frame.tb_next
    return _ours(str(frame.tb_frame.f_globals.get("__name__", "")))


def _from_ray(error: BaseException) -> BaseException:
    """What a Ray task raised, without Ray's wrapping, whose message is a whole traceback."""
    exceptions = sys.modules.get("ray.exceptions")
    if exceptions is not None and isinstance(error, exceptions.RayTaskError):
        cause = getattr(error, "cause", None)
        if isinstance(cause, BaseException):
            return cause
    return error
