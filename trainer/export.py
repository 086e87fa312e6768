"""Writing a trained model as `transformers` expects it, complete or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from model import PlugLMForMaskedLM

MODEL = "model"


def export_model(model: PlugLMForMaskedLM, tokenizer: Any, run_dir: Path) -> Path:
    """Write `config.json`, `model.safetensors` and the tokenizer to ``run_dir/model``.

    Written beside and renamed, so a reader finds the old model or the new one, never half of one.

    Returns:
        The model's directory.
    """
    final, temporary = run_dir / MODEL, run_dir / f".writing-{MODEL}"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if final.exists():
        retired = run_dir / f".old-{MODEL}"
        shutil.rmtree(retired, ignore_errors=True)
        final.rename(retired)
        temporary.rename(final)
        shutil.rmtree(retired)
    else:
        temporary.rename(final)
    return final


def read_exported(run_dir: Path) -> PlugLMForMaskedLM:
    """The model that a run exported, in eval mode; called without a lookup, it is meant so."""
    model = PlugLMForMaskedLM.from_pretrained(run_dir / MODEL)
    model.attach(None)
    return model


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside and rename it into place."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write text beside and rename it into place."""
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
