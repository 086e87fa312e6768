"""A BERT or a PlugLM in transformers' format, opened as tensors: nothing in it is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from model import PlugLMConfig
from trainer.convert.errors import ConversionError
from trainer.convert.files import load_tensors, read_json

_WHOLE = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model directory: its configuration, and where its weights lie."""

    path: Path
    config: Any
    model_type: str

    def tensors(self) -> dict[str, Tensor]:
        """All its tensors, of one file or of several with an index.

        Raises:
            ConversionError: there are none, or a file is missing, damaged or holds code.
        """
        for name in _WHOLE:
            if (self.path / name).is_file():
                return load_tensors(self.path / name)
            index = self.path / f"{name}.index.json"
            if index.is_file():
                return _shards(self.path, index)
        raise ConversionError(
            f"{self.path} cannot be loaded: it has neither {' nor '.join(_WHOLE)}; give the "
            "directory of a whole checkpoint"
        )


def open_source(path: Path, *, pluglm: bool = True) -> ModelSource:
    """Open a model directory, or one that holds it as model/, as conversions and runs do.

    Args:
        pluglm: whether a PlugLM will do as well as a BERT; without, it is refused.

    Raises:
        ConversionError: there is no configuration, it cannot be read, or it is of another model.
    """
    wanted = "BERT or PlugLM" if pluglm else "BERT"
    if not (path / "config.json").is_file() and (path / "model" / "config.json").is_file():
        path = path / "model"
    if not (path / "config.json").is_file():
        raise ConversionError(
            f"{path} holds no config.json; give the directory of a {wanted} checkpoint in "
            "transformers' format"
        )
    kind = str(read_json(path / "config.json").get("model_type"))
    if kind == PlugLMConfig.model_type and not pluglm:
        raise ConversionError(f"{path} is a PlugLM already; it can be used as it is")
    if kind not in ("bert", PlugLMConfig.model_type):
        raise ConversionError(
            f'{path} is a {kind!r} model; give a {wanted} checkpoint: the "model_type" of its '
            f"config.json is 'bert'{f' or {PlugLMConfig.model_type!r}' if pluglm else ''}"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        # transformers reports a bad setting by an error of its own kind, which differs by version.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"{path / 'config.json'} cannot be loaded: {reason}") from error
    return ModelSource(path=path, config=config, model_type=kind)


def fetch_source(name: str) -> Path:
    """The directory of a checkpoint: itself, or what transformers' hub has under this name.

    Blocks while it is downloaded; what was downloaded before is taken from the cache.

    Raises:
        ConversionError: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConversionError(f"there is no directory {name}; correct the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    path = Path()
    try:
        # Many repositories hold the weights twice: the second kind only where the first is not.
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            path = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", weights]))
            if any(path.glob(weights)):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"{name!r} is no directory here and cannot be downloaded ({reason}); correct it, or "
            "give a directory"
        ) from error
    return path


def _shards(path: Path, index: Path) -> dict[str, Tensor]:
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict):
        raise ConversionError(f"{index} has no weight_map; restore it from a copy")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(file) for file in weights.values()}):
        if Path(name).name != name:
            raise ConversionError(f"{index} names a file outside its directory: {name}")
        tensors |= load_tensors(path / name)
    return tensors
