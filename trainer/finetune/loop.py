"""`transformers.Trainer` as fine-tuning uses it: its arguments, its sampler, its callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trainer.errors import TrainingError
from trainer.finetune.encoded import OWN_DOC_IDS, RIGHT_ENTRIES, EncodedRows, PaddedBatches
from trainer.finetune.heads import Head
from trainer.finetune.memory import ReadMemory
from trainer.finetune.order import EpochOrder
from trainer.finetune.own_key import own_key_loss, own_label_loss
from trainer.finetune.settings import FinetuneSettings

Say = Callable[[str], None]


def training_arguments(
    settings: FinetuneSettings, head: Head, *, work: Path, seed: int, device: str
) -> TrainingArguments:
    """What the Trainer is told: one evaluation and one checkpoint per epoch, the best is kept."""
    train = settings.train
    arguments = TrainingArguments(
        output_dir=str(work),
        run_name=f"{Path(settings.run.dir).name}-seed{seed}",
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.eval_batch_size,
        gradient_accumulation_steps=train.accumulation_steps,
        learning_rate=train.lr,
        lr_scheduler_type="linear",
        warmup_steps=train.warmup_ratio,  # below 1 it is a share
        weight_decay=train.weight_decay,
        max_grad_norm=train.grad_clip,
        seed=seed,
        data_seed=seed,
        bf16=train.precision == "bf16",
        fp16=train.precision == "fp16",
        use_cpu=device == "cpu",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model=settings.task.deciding_metric,
        greater_is_better=True,
        logging_strategy="epoch",
        # The filter would replace a NaN loss by the mean of the others.
        logging_nan_inf_filter=False,
        report_to=[] if settings.run.wandb == "disabled" else ["wandb"],
        disable_tqdm=not settings.run.progress,
        remove_unused_columns=False,
        label_names=list(head.target_names),
        dataloader_pin_memory=device == "cuda",
    )
    if arguments.n_gpu > 1:
        # More GPUs are torchrun's: DataParallel would copy the model, and lose its memory.
        arguments._n_gpu = 1
    return arguments


class TaskTrainer(Trainer):
    """A Trainer whose training rows come in an order of our own; evaluations are in the file's.

    The Trainer's own settings for batches of like length, and for leaving out an incomplete batch,
    would reorder and shorten evaluations as well.
    """

    def __init__(
        self,
        *given: Any,
        order: EpochOrder,
        memory: ReadMemory | None,
        separator: int | None,
        **named: Any,
    ) -> None:
        super().__init__(*given, **named)
        self._order = order
        self._memory = memory
        self._separator = separator

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The task's loss and, in training, that of retrieval if it has a weight.

        Rows that have documents of their own do not find these.
        """
        right_entries_BS = inputs.pop(RIGHT_ENTRIES, None)
        own_doc_ids_B = inputs.pop(OWN_DOC_IDS, None)
        if own_doc_ids_B is not None:
            assert self._memory is not None
            inputs = {**inputs, "lookup": self._memory.lookup(own_doc_ids_B)}
        weight = 0.0 if self._memory is None else self._memory.settings.retrieval_loss_weight
        if self._memory is None or not weight or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        plain = self.accelerator.unwrap_model(model)
        if self._memory.settings.find_own_label:
            assert right_entries_BS is not None
            assert own_doc_ids_B is not None
            retrieval = own_label_loss(
                plain, outputs.retrievals, right_entries_BS, labels, own_doc_ids_B
            )
        else:
            retrieval = own_key_loss(
                plain,
                outputs.retrievals,
                inputs["input_ids"],
                entry_tokens=self._memory.entry_tokens,
                separator=self._separator,
                right_entries=right_entries_BS,
            )
        loss = loss + weight * retrieval
        return (loss, outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return self._order


class Watch(TrainerCallback):
    """Says how each epoch ended, and ends a run whose loss is no number any more."""

    def __init__(self, seed: int, metric: str, say: Say) -> None:
        self._seed, self._metric, self._say = seed, metric, say

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After each epoch's training, and after its evaluation."""
        logs = given["logs"]
        for name in ("loss", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise TrainingError(
                    f"seed {self._seed}: {name} is {logs[name]} at step {state.global_step}: "
                    "training diverged; lower train.lr, or raise train.warmup_ratio. Finished "
                    "seeds are kept"
                )

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After dev was measured."""
        metrics = given["metrics"]
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        loss = f", training loss {losses[-1]:.4f}" if losses else ""
        self._say(
            f"seed {self._seed}, epoch {metrics['epoch']:g} of {args.num_train_epochs:g}: dev "
            f"{self._metric} {metrics[f'eval_{self._metric}']:.4f}{loss}"
        )


def make_trainer(
    settings: FinetuneSettings,
    head: Head,
    model: Any,
    encoded: dict[str, EncodedRows],
    *,
    arguments: TrainingArguments,
    tokenizer: Any,
    seed: int,
    leave_out: int,
    say: Say,
    memory: ReadMemory | None = None,
) -> TaskTrainer:
    """A Trainer that measures dev after each epoch and keeps the best weights.

    Args:
        leave_out: training rows, others in each epoch, that are not learned from.
        memory: what the model reads, for rows that must not find entries of their own.
    """

    def dev_scores(output: Any) -> dict[str, float]:
        return head.scores(head.predictions("dev", encoded["dev"], output.predictions))

    callbacks: list[TrainerCallback] = [Watch(seed, settings.task.deciding_metric, say)]
    if settings.train.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(settings.train.early_stopping_patience))
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
    trainer = TaskTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded["dev"],
        data_collator=PaddedBatches(pad_token_id=tokenizer.pad_token_id),
        compute_metrics=dev_scores,
        callbacks=callbacks,
        memory=memory,
        separator=tokenizer.sep_token_id,
        order=EpochOrder(
            encoded["train"].lengths,
            seed=seed,
            group_size=batch if settings.train.group_by_length else 0,
            leave_out=leave_out,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    if not settings.run.progress:
        trainer.remove_callback(ProgressCallback)
    return trainer
