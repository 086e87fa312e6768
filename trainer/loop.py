"""One trainer's run, from its first step to its last."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from typing import Any

import psutil
import torch
from torch import Tensor

from memory_server.api import Retrieved
from model import KeyEncoderFactory, PlugLMConfig
from trainer import checkpoint as checkpoints
from trainer.build import build_model
from trainer.control import Control
from trainer.corpus.tokenizer import load_tokenizer
from trainer.data import rng
from trainer.data.stream import TrainBatch
from trainer.distributed import barrier, sum_over_ranks
from trainer.drift import KeyDrift
from trainer.engine import TrainingEngine, start_process_group, stop_process_group
from trainer.errors import CheckpointError, CheckpointRefused
from trainer.evaluate import right_entries
from trainer.export import export_model
from trainer.follower import MemoryFollower
from trainer.heldout import heldout_numbers
from trainer.job import TrainJob, TrainOutcome
from trainer.lost_shards import LostShards
from trainer.meters import RunningMeans, StepTimer
from trainer.metrics import MetricsWriter
from trainer.reads.counter import ReadCounter
from trainer.reads.files import read_counted
from trainer.reads.shares import reads_of
from trainer.saving import CheckpointSaver
from trainer.searching import MemoryLookup
from trainer.settings import TrainSettings
from trainer.shared_directory import check_shared
from trainer.skipping import SkippedSteps
from trainer.task import Stream


def run_rank(job: TrainJob, rank: int, control: Control) -> TrainOutcome:
    """Train as one of the ranks; collective, blocks until the last step or a requested stop.

    Raises:
        TrainingError: training cannot go on; says why. CheckpointError: the disk refused.
    """
    settings = job.settings
    torch.set_num_threads(settings.runtime.threads_per_trainer)
    start_process_group(
        job.device,
        rank=rank,
        world_size=settings.runtime.trainers,
        init_method=job.init_method,
    )
    # Left only when all went well: after a failure the other ranks are in a collective that this
    # one will not join, leaving would wait for them (NCCL does), and nobody would hear why. Whoever
    # started the ranks ends their processes.
    check_shared(
        job.run_dir,
        torch.device(job.device),
        rank=rank,
        ranks=settings.runtime.trainers,
        driver=job.driver_mark,
    )
    metrics = None
    if rank == 0:
        metrics = MetricsWriter(
            job.run_dir,
            wandb=settings.logging.wandb,
            wandb_project=settings.logging.wandb_project,
            config=job.resolved_config,
            run_name=settings.run.name or job.run_dir.name,
            resume=job.resumes,
        )
    try:
        with closing(_Run(job, rank, control, metrics)) as run:
            outcome = run.to_the_end()
    finally:
        if metrics is not None:
            metrics.close()
    stop_process_group()
    return outcome


class _Run:
    """A rank's state between steps."""

    def __init__(
        self, job: TrainJob, rank: int, control: Control, metrics: MetricsWriter | None
    ) -> None:
        settings, start = job.settings, job.start
        self.job, self.rank, self.control, self.metrics = job, rank, control, metrics
        self.settings = settings
        self.step = start.step
        self.recovery = job.recovery
        self._line_lost = False
        torch.manual_seed(_rng_seed(settings, rank, 0))
        model = build_model(
            PlugLMConfig.from_dict(job.model_config),
            seed=settings.run.seed,
            init_from=settings.model.init_from,
        )
        self.engine = TrainingEngine(model, settings, job.device)
        if job.checkpoint is not None:
            self.engine.load(job.checkpoint, start.engine)
            if start.trainers == settings.runtime.trainers:
                checkpoints.read_rng(job.checkpoint, rank)
            else:
                # Ranks are others than they were: each has random numbers of its own from here.
                torch.manual_seed(_rng_seed(settings, rank, start.step))
        if metrics is not None and job.resumes:
            metrics.truncate_after(start.step)
        for note in job.notes:
            self._record("event", self.step, message=note)
        self.drift = KeyDrift(KeyEncoderFactory(job.model_config))
        self.follower = MemoryFollower(
            job.memory,
            self.engine,
            settings.memory,
            rank=rank,
            epoch=job.epoch,
            encoder_step=start.encoder_step,
            published_step=start.published_step,
            live_content=job.content_version,
            live_weights=self._live_weights(),
            content_version=job.task.content_version,
            stop_requested=self._look_for_stop,
            record=self._record,
            say=control.say,
            drift=self.drift,
        )
        self.reads = self._read_counter() if settings.logging.memory_usage else None
        self.saver = CheckpointSaver(
            job.run_dir,
            settings,
            job.resolved_config,
            rank=rank,
            engine=self.engine,
            follower=self.follower,
            record=self._record,
            saved_step=start.step if job.checkpoint is not None else -1,
            corpus_fingerprint=start.corpus_fingerprint,
            beat=control.beat,
            reads=self.reads,
        )
        self.skipped = SkippedSteps(
            self.engine,
            limit=settings.optim.max_skipped_steps,
            rank=rank,
            ranks=settings.runtime.trainers,
            tell=self._tell,
        )
        self.memory_bytes = sum(job.memory.info().bytes.values())
        self.lost_shards = LostShards(self._tell)
        self.searches = ThreadPoolExecutor(
            settings.runtime.retrieval_chunks, thread_name_prefix="search"
        )
        self.means, self.timer = RunningMeans(), StepTimer()
        self.steps_since_log = self.sequences_since_log = 0

    def _look_for_stop(self) -> bool:
        """Whether to end; whoever asks while it waits is not stalled."""
        self.control.beat()
        return self.control.stop_requested()

    def _live_weights(self) -> dict[str, Tensor]:
        """The weights that made the live keys: the checkpoint's, or those of the start."""
        if self.job.checkpoint is not None:
            return checkpoints.read_key_weights(self.job.checkpoint)
        return self.engine.key_weights()

    def _read_counter(self) -> ReadCounter:
        checkpoint = self.job.checkpoint
        return ReadCounter(
            self.job.memory,
            rank=self.rank,
            ranks=self.settings.runtime.trainers,
            device=self.engine.device,
            since_step=self.step,
            counted=None if checkpoint is None or self.rank else read_counted(checkpoint),
        )

    def close(self) -> None:
        """Let go of the memory's epoch."""
        self.searches.shutdown(cancel_futures=True)
        self.follower.close()

    def to_the_end(self) -> TrainOutcome:
        """Train until the last step or until asked to stop."""
        settings = self.settings
        stream = self.job.task.open(
            settings,
            rank=self.rank,
            world_size=settings.runtime.trainers,
            cursor=self.job.start.cursor,
            step=self.step,
        )
        try:
            self.engine.train()
            self.timer.take()
            stopped = False
            while self.step < settings.optim.steps:
                stopped = self.follower.boundary(self.step)
                if stopped:
                    break
                self._train_step(stream)
                self._note_recovery()
                self._log()
                if self.skipped.too_many:
                    self.saver.save(self.step, stream.cursor)
                    saved = checkpoints.checkpoint_path(self.job.run_dir, self.step)
                    raise self.skipped.error(self.step, saved.name)
                # What comes once in a while is left out of the steps' speed.
                with self.timer.paused():
                    if _due(self.step, settings.checkpoint.every_steps):
                        self._save(stream)
                    if _due(self.step, settings.evaluate.every_steps):
                        self._evaluate()
            self._note_recovery()
            if self.step != self.saver.saved_step:
                self._save_last(stream)
        finally:
            stream.close()
        if not stopped:
            self._export()
            stopped = self.follower.finish(self.step)
        last = checkpoints.checkpoint_path(self.job.run_dir, self.saver.saved_step)
        return TrainOutcome(step=self.step, stopped=stopped, checkpoint=last)

    def _save(self, stream: Stream) -> None:
        """A checkpoint on the way: one that the disk refuses costs only what it would have kept."""
        try:
            self.saver.save(self.step, stream.cursor)
        except CheckpointRefused as error:
            self._tell(
                f"{error}: training goes on, and the next checkpoint is tried when it is due"
            )

    def _save_last(self, stream: Stream) -> None:
        """The checkpoint that nothing comes after. Raises CheckpointError."""
        try:
            self.saver.save(self.step, stream.cursor)
        except CheckpointRefused as error:
            raise CheckpointError(f"{error} and resume with --resume") from error

    def _note_recovery(self) -> None:
        """Once, when training moves again after a fault: what that cost."""
        recovery, self.recovery = self.recovery, None
        if recovery is None:
            return
        first = self.job.start.step
        self._record(
            "restart",
            first,
            reason=recovery.reason,
            restarts=recovery.restarts,
            failed_step=recovery.failed_step,
            steps_again=recovery.failed_step - first,
            seconds=max(0.0, time.time() - recovery.began),
            trainers=self.settings.runtime.trainers,
        )

    def _train_step(self, stream: Stream) -> None:
        """One optimizer step: every micro-batch sees the same memory epoch."""
        with self.timer.part("data"):
            batches = [b.to(self.engine.device, non_blocking=True) for b in next(stream)]
        optim = self.settings.optim
        labelled = torch.stack([(b.labels != -100).sum() for b in batches]).sum().double()
        # The mean is over all masks of the global batch, however ranks and micro-batches cut it;
        # DeepSpeed then averages over both, so each part is scaled by their number.
        everywhere = sum_over_ranks(labelled.clone())
        parts = self.settings.runtime.trainers * len(batches)
        denominator = (everywhere / parts).clamp(min=1.0).float()
        losses, noted, reads = [], [], []
        for batch in batches:
            excluded_B = self._excluded(batch)
            warming = self.step < optim.retrieval_warmup_steps and batch.positive_tokens is not None
            output = self.engine.forward_backward(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.labels,
                lookup=self._search(batch, excluded_B),
                positive_tokens=batch.positive_tokens if warming else None,
                positive_ids=batch.positive_ids,
                doc_ids=batch.doc_ids,
                retrieval_loss_weight=optim.retrieval_loss_weight,
                retrieval_temperature=optim.retrieval_temperature,
                loss_denominator=denominator,
                output_attention=self.reads is not None,
                retrieval_chunks=self.settings.runtime.retrieval_chunks,
            )
            self.engine.step()
            if self.reads is not None:
                reads += reads_of(output.retrievals)
            noted.append(self._numbers(batch, output, denominator, excluded_B))
            losses.append(output.loss.detach())
        self.step += 1
        self.steps_since_log += 1
        self.sequences_since_log += sum(len(batch.doc_ids) for batch in batches)
        if not self.skipped.after(self.step, torch.stack(losses)):
            for weight, values in chain.from_iterable(noted):
                self.means.add(weight=weight, **values)
            if self.reads is not None:
                self.reads.add(reads)

    def _excluded(self, batch: TrainBatch) -> Tensor:
        """Which sequences must do without their own document, bool [B].

        Drawn by step and right entry, so the same however ranks and micro-batches cut the batch.
        """
        memory = self.settings.memory
        share = memory.exclude_own_document_share if memory.exclude_own_document else 0.0
        drawn = rng.uniform(
            rng.derive_key(self.settings.run.seed, self.step), batch.positive_ids.cpu().numpy()
        )
        return torch.from_numpy(drawn < share).to(self.engine.device)

    @property
    def _always_excludes(self) -> bool:
        memory = self.settings.memory
        return memory.exclude_own_document and memory.exclude_own_document_share >= 1

    def _search(self, batch: TrainBatch, excluded_B: Tensor) -> MemoryLookup:
        """The memory as the model asks it: pinned to the step's epoch."""
        exclude = batch.doc_ids.masked_fill(~excluded_B, -1) if bool(excluded_B.any()) else None
        return MemoryLookup(
            self.job.memory,
            k=self.settings.memory.top_k,
            epoch=self.follower.epoch,
            exclude_doc_ids=exclude,
            pool=self.searches,
            waiting=lambda: self.timer.part("retrieval"),
            note=self._note_reply,
        )

    def _note_reply(self, found: Retrieved) -> None:
        self.lost_shards.note(found)
        if self.rank == 0:
            self.drift.note(found)

    def _numbers(
        self, batch: TrainBatch, output: Any, denominator: Tensor, excluded_B: Tensor
    ) -> list[tuple[float, dict[str, float | Tensor]]]:
        """A micro-batch's numbers, with their weights; they are reduced when a line is written."""
        labels_m = batch.labels[batch.labels != -100]
        masks = len(labels_m)
        correct = (output.logits.detach().argmax(-1) == labels_m).float().sum()
        mlm_loss = output.mlm_loss.detach() * denominator / max(masks, 1)
        numbers: list[tuple[float, dict[str, float | Tensor]]] = [
            (masks, {"mlm_loss": mlm_loss, "mlm_accuracy": correct / max(masks, 1)}),
            (1.0, {"loss": output.loss.detach()}),
        ]
        if output.retrieval_loss is not None:
            numbers.append((1.0, {"retrieval_loss": output.retrieval_loss.detach()}))
        could_be_found_B = batch.positive_ids.masked_fill(excluded_B, -1)
        found, asked = right_entries(output.retrievals[-1].retrieved, could_be_found_B)
        return [*numbers, (asked, {"right_entry_rate": found / max(asked, 1.0)})]

    def _log(self) -> None:
        """Every few steps: reduce over the ranks, write a line; else only the step's number."""
        self.control.report({"step": self.step})
        if self.step % self.settings.logging.log_every_steps and self.step != 1:
            return
        means = self.means.take(sum_over_ranks)
        if math.isnan(means.get("right_entry_rate", 0.0)):
            del means["right_entry_rate"]  # no sequence could have found its entry
        seconds, total = self.timer.take()
        steps, self.steps_since_log = self.steps_since_log, 0
        mine, self.sequences_since_log = self.sequences_since_log, 0
        device = self.engine.device
        sequences = int(sum_over_ranks(torch.tensor(float(mine), device=device)))
        searches = steps * self.settings.accumulation_steps * self.settings.model.memory_layers
        line = {
            **means,
            "lr": self.engine.lr,
            "grad_norm": self.engine.grad_norm,
            "sequences_per_s": sequences / total,
            "retrieval_ms": 1000 * seconds.get("retrieval", 0.0) / max(searches, 1),
            "data_ms": 1000 * seconds.get("data", 0.0) / max(steps, 1),
            "staleness_steps": self.step - self.follower.encoder_step,
            "epoch": self.follower.epoch,
            "rss_gib": psutil.Process().memory_info().rss / 2**30,
            "memory_bytes": self.memory_bytes,
        }
        left_out = self.skipped.take()
        if left_out:
            line["skipped_steps"] = left_out
        # Every rank asks the same shards: rank 0 tells at once, the line counts all searches.
        taken = torch.tensor(float(self.lost_shards.take()), device=device)
        missing = int(sum_over_ranks(taken))
        if missing:
            line["searches_missing_shards"] = missing
        if self.reads is not None:
            line |= self.reads.figures(self.follower.content_version)
        self._record("train", self.step, **line)
        self.control.report(line)

    def _evaluate(self) -> None:
        """Held-out loss with the memory as it is now; collective."""
        started = time.perf_counter()
        world_size = self.settings.runtime.trainers
        batches = self.job.task.heldout(self.settings, rank=self.rank, world_size=world_size)

        def search_for(batch: TrainBatch) -> MemoryLookup:
            self.control.beat()
            out_B = torch.full_like(batch.doc_ids, self._always_excludes, dtype=torch.bool)
            return self._search(batch, out_B)

        numbers = heldout_numbers(self.engine, batches, search_for)
        self._record("eval", self.step, **numbers, seconds=time.perf_counter() - started)

    def _export(self) -> None:
        """Write the model as transformers expects it; collective under ZeRO-3."""
        with self.engine.whole_weights() as model:
            if self.rank == 0:
                export_model(model, load_tokenizer(self.job.tokenizer), self.job.run_dir)
        barrier()

    def _tell(self, message: str) -> None:
        self._record("event", self.step, message=message)
        self.control.say(message)

    def _record(self, kind: str, step: int, **numbers: object) -> None:
        if self.metrics is None:
            return
        try:
            self.metrics.write(kind, step, **numbers)
        except OSError as error:
            # A full disk costs a line, not the run. It is said once each time it begins.
            if not self._line_lost:
                self.control.say(
                    f"{self.metrics.path} cannot be written ({error.strerror or error}): training "
                    "goes on, its lines are lost until there is room"
                )
            self._line_lost = True
        else:
            self._line_lost = False


def _rng_seed(settings: TrainSettings, rank: int, step: int) -> int:
    """Seed of a rank's dropout from a step on; other ranks and steps have others."""
    place = settings.run.seed * 1_000_003 + rank
    return place if step == 0 else int(rng.derive_key(place, step)[0]) % 2**63


def _due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is done after this one."""
    return every > 0 and step % every == 0
