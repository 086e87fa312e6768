"""Plain BERT pre-trained on text: what a model with a memory is compared with.

Masked language modelling without a memory, which `pluglm pretrain` has no place for: its every step
searches one. `transformers` has the model, the masking and the loop.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import model as pluglm
from trainer.corpus.cutting import cut
from trainer.corpus.entries import begins_word
from trainer.corpus.tokenizer import load_tokenizer
from trainer.errors import TrainingError
from trainer.export import write_json
from trainer.finetune.encoded import IGNORED
from trainer.finetune.errors import TaskDataError
from trainer.settings_fields import ConfigError

ABOUT = "baseline.json"
MASK_PROBABILITY, WARMUP, WEIGHT_DECAY = 0.15, 0.06, 0.01
_TEXTS = 512
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PlainTraining:
    """How long and how fast.

    Attributes:
        steps: optimizer steps.
        sequence_length: longest sequence, in tokens, special ones included.
        lr: peak learning rate; it rises over 6 % of the steps, and falls linearly to 0.
        device: "cpu" or "cuda".
    """

    steps: int
    batch_size: int
    sequence_length: int
    lr: float
    seed: int
    device: str
    precision: str = "fp32"


class TokenSequences(Dataset[dict[str, list[int]]]):
    """Texts as sequences of tokens, [CLS] and [SEP] included, in one array."""

    def __init__(self, texts: Iterable[str], tokenizer: Any, length: int) -> None:
        """Tokenise and cut at words; blocks."""
        self._prefix, self._suffix = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        pieces: list[npt.NDArray[np.int32]] = []
        block: list[str] = []

        def encode() -> None:
            encodings = tokenizer.backend_tokenizer.encode_batch(block, add_special_tokens=False)
            for encoding in encodings:
                ids = np.array(encoding.ids, dtype=np.int32)
                spans = cut(begins_word(encoding), length - 2)
                pieces.extend(ids[start:end] for start, end in spans)
            block.clear()

        for text in texts:
            block.append(text)
            if len(block) == _TEXTS:
                encode()
        encode()
        self.tokens = sum(len(piece) for piece in pieces)
        self._flat = np.concatenate([*pieces, np.empty(0, dtype=np.int32)])
        self._ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        start = int(self._ends[row - 1]) if row else 0
        inside = self._flat[start : int(self._ends[row])].tolist()
        return {"input_ids": [*self._prefix, *inside, *self._suffix]}


def open_plain(path: Path) -> Any:
    """A masked language model that reads no memory, with its weights.

    Raises:
        FileNotFoundError: there is none. ConfigError: it has memory layers, or cannot be loaded.
    """
    config = _config(path)
    if isinstance(config, pluglm.PlugLMConfig) and config.num_memory_layers:
        raise ConfigError(
            f"{path} is a PlugLM with memory layers, which `pluglm pretrain` trains; give a plain "
            "BERT, or make one of its size with --like"
        )
    try:
        return AutoModelForMaskedLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the model {path} cannot be loaded ({reason})") from error


def plain_like(path: Path, *, seed: int) -> BertForMaskedLM:
    """Plain BERT of a PlugLM's sizes, with random weights that the seed decides.

    Raises:
        FileNotFoundError: there is none. ConfigError: it is no PlugLM.
    """
    config = _config(path)
    if not isinstance(config, pluglm.PlugLMConfig):
        raise ConfigError(
            f"{path} is a {config.model_type} model, no PlugLM; go on with it: --from"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(
            BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                max_position_embeddings=config.max_position_embeddings,
                hidden_dropout_prob=config.hidden_dropout_prob,
                attention_probs_dropout_prob=config.attention_probs_dropout_prob,
                initializer_range=config.initializer_range,
                pad_token_id=config.pad_token_id,
            )
        )


def pretrain_plain(
    model: Any,
    tokenizer_path: Path,
    texts: Iterable[str],
    out: Path,
    training: PlainTraining,
    *,
    about: dict[str, Any],
    say: Say,
) -> dict[str, Any]:
    """Train a plain masked language model on texts and write it with its tokenizer; blocks.

    `out` appears when it is whole.

    Args:
        model: what `open_plain` or `plain_like` returned.
        tokenizer_path: directory of its tokenizer.
        about: what `baseline.json` tells beside what was done.
        say: told of the progress.

    Returns:
        What `baseline.json` holds.

    Raises:
        ConfigError: `out` is there, or sequences are longer than the model reads.
        TaskDataError: there is no text. TrainingError: the loss is no number any more.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already; choose another --out")
    longest = int(model.config.max_position_embeddings)
    if training.sequence_length > longest:
        raise ConfigError(
            f"--sequence-length {training.sequence_length}: must be at most {longest}, the "
            "positions of the model"
        )
    began = time.monotonic()
    tokenizer: Any = load_tokenizer(tokenizer_path)
    data = TokenSequences(texts, tokenizer, training.sequence_length)
    if not len(data):
        raise TaskDataError("there is no text in the files; give some")
    say(f"{len(data):,} sequences of {data.tokens:,} tokens, {training.steps:,} steps")
    work = out.with_name(f".{out.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    watch = _Losses(training.steps, say)
    try:
        trainer = MaskedTrainer(
            model=model,
            args=_arguments(training, work),
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(
                tokenizer, mlm_probability=MASK_PROBABILITY
            ),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
        model.save_pretrained(work / "whole")
        tokenizer.save_pretrained(work / "whole")
        told = {
            **about,
            "steps": training.steps,
            "batch_size": training.batch_size,
            "sequence_length": training.sequence_length,
            "lr": training.lr,
            "seed": training.seed,
            "sequences": len(data),
            "tokens": data.tokens,
            "losses": watch.losses,
            "seconds": round(time.monotonic() - began, 3),
        }
        write_json(work / "whole" / ABOUT, told)
        out.parent.mkdir(parents=True, exist_ok=True)
        (work / "whole").rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return told


class MaskedTrainer(Trainer):
    """Has BERT predict at the masks alone: most of a small model's time is its output layer."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean cross-entropy over the masked positions, as the model itself computes it."""
        if not isinstance(model, BertForMaskedLM) or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels_BT = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        hidden_BTH = model.bert(**rest).last_hidden_state
        masked_BT = labels_BT != IGNORED
        logits_MV = model.cls(hidden_BTH[masked_BT])
        total = functional.cross_entropy(logits_MV.float(), labels_BT[masked_BT], reduction="sum")
        return total / masked_BT.sum().clamp(min=1)


class _Losses(TrainerCallback):
    """Keeps and tells the loss, and ends a training whose loss is no number any more."""

    def __init__(self, steps: int, say: Say) -> None:
        self._steps, self._say = steps, say
        self.losses: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After every tenth of the steps."""
        loss = given["logs"].get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}: training diverged; lower --lr"
            )
        self.losses.append({"step": state.global_step, "loss": round(float(loss), 4)})
        self._say(f"step {state.global_step:,} of {self._steps:,}: masked-LM loss {loss:.3f}")


def _arguments(training: PlainTraining, work: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=training.lr,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP,  # below 1 it is a share
        weight_decay=WEIGHT_DECAY,
        seed=training.seed,
        data_seed=training.seed,
        bf16=training.precision == "bf16",
        use_cpu=training.device == "cpu",
        logging_steps=max(1, training.steps // 10),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=training.device == "cuda",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no model at {path} (no config.json); give a directory in transformers' "
            "format"
        )
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path} cannot be read: {reason}") from error
