"""Files of strangers, read without running anything that is in them; and output that is whole."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.convert.errors import ConversionError
from trainer.convert.pickles import inspect_pickles

_NAMED = 3  # of what a refused pickle asks for, how many names are told


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint of `torch.save` or safetensors, memory-mapped where its format allows.

    Only tensors are read: a pickle that asks for anything else is refused and not executed.

    Raises:
        ConversionError: it is missing, damaged, holds code, or is no dictionary of tensors.
    """
    _must_exist(path, "checkpoint")
    if not path.stat().st_size:
        raise ConversionError(f"{path} is empty, not a checkpoint; restore it from a copy")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            # Advice to torch's developers, about formats that are read or refused all the same.
            warnings.simplefilter("ignore", UserWarning)
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (
        pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError,
        TypeError, OSError, AttributeError, IndexError, AssertionError, struct.error,
    ) as error:  # fmt: skip
        raise _unreadable(path, error) from error
    if not isinstance(loaded, Mapping):
        raise ConversionError(
            f"{path} holds a {type(loaded).__name__}, not names and tensors; save "
            "model.state_dict() itself"
        )
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConversionError(
                f"{path} holds {type(value).__name__} under {name!r}, not a tensor; save "
                "model.state_dict() itself"
            )
    return dict(loaded)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors as transformers does; tensors that share memory are written each."""
    seen: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        own = value.untyped_storage().data_ptr() not in seen or value.numel() == 0
        seen.add(value.untyped_storage().data_ptr())
        apart[name] = value.contiguous() if own else value.clone().contiguous()
    save_file(apart, path, metadata={"format": "pt"})


def map_array(path: Path) -> npt.NDArray[Any]:
    """Map a .npy file; nothing of it is read yet.

    Raises:
        ConversionError: it is missing, truncated, holds Python objects or is no .npy file.
    """
    _must_exist(path, "array")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        message = str(error)
        if "pickle" in message or "object" in message:
            raise ConversionError(
                f"{path} holds Python objects, or is no .npy file, so it was not opened: opening "
                "it could run code; save a plain array with numpy.save"
            ) from error
        raise _damaged(path, error) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ConversionError(f"{path} holds several arrays (.npz); give a .npy file of one")
    return array


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConversionError: it is missing or is none."""
    _must_exist(path, "configuration")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConversionError(f"{path} is no JSON file ({_first_line(error)})") from error
    if not isinstance(raw, dict):
        raise ConversionError(f"{path} holds a JSON {type(raw).__name__}, not an object")
    return raw


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when everything went well and is removed if not.

    Raises:
        ConversionError: `out` exists and is not empty.
    """
    refuse_full(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".writing-{out.name}-", dir=out.parent))
    try:
        temporary.chmod(0o755)  # as mkdir makes it: mkdtemp makes it private
        yield temporary
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_full(out: Path) -> None:
    """Raise ConversionError if `out` is there and is not an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} exists and is not empty; give another --out, or remove it")


def _must_exist(path: Path, what: str) -> None:
    if not path.is_file():
        raise ConversionError(f"there is no {what} {path}; correct the path")


def _unreadable(path: Path, error: Exception) -> ConversionError:
    """Why a checkpoint was refused, in words that do not depend on torch's."""
    if path.suffix == ".safetensors":
        return _damaged(path, error)
    content = inspect_pickles(path)
    remedy = "get it as safetensors, or as torch.save(model.state_dict(), ...) writes it"
    if content.foreign:
        names = ", ".join(content.foreign[:_NAMED])
        more = len(content.foreign) - _NAMED
        return ConversionError(
            f"{path} holds code, or objects that only code can make: it asks for {names}"
            f"{f' and {more} more' if more > 0 else ''}. Nothing of it was run; use a file of "
            f"plain tensors: {remedy}"
        )
    if isinstance(error, (RuntimeError, OSError)):  # of the archive, not of a pickle
        return _damaged(path, error)
    if content.whole:
        return ConversionError(
            f"{path} is a pickle that cannot be read as plain tensors, by torch.save's default "
            f"protocol, so nothing of it was run; {remedy}"
        )
    return ConversionError(
        f"{path} is not a checkpoint, or is damaged: no pickle and no archive of one; correct the "
        "path, or restore it from a copy"
    )


def _damaged(path: Path, error: Exception) -> ConversionError:
    line = _first_line(error)
    # torch's advice is to load without care.
    reason = "" if "weights_only" in line else f" ({line})"
    return ConversionError(
        f"{path} is damaged, or no file of this kind{reason}; restore it from a copy"
    )


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else f"{line[:159]}…"
