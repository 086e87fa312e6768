"""Saving a checkpoint and going on from it, against DeepSpeed's own and `torch.save`.

One rank under ZeRO-1 with AdamW. Ours writes weights and moments by name, and the weights that made
the memory's keys, with checksums, synced to disk and renamed when whole: any number of trainers
under any stage can go on from it. DeepSpeed's `save_checkpoint` writes weights, moments and its own
float32 copy of the weights; `torch.save` is given weights and moments. The files of both are
synced, too. All save, turn by turn; then all load what they saved last.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import (
    Spread,
    argument_parser,
    begin,
    finish,
    positive,
    seconds,
    spread_of_ratios,
    table,
    turn_by_turn,
)

from trainer import checkpoint as checkpoints
from trainer.build import build_model, model_config
from trainer.checkpoint import CheckpointState
from trainer.data.cursor import Cursor
from trainer.engine import TrainingEngine, start_process_group, stop_process_group
from trainer.settings import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    RuntimeSettings,
    TrainSettings,
)

OURS, DEEPSPEED, TORCH = "ours", "DeepSpeed's save_checkpoint", "torch.save"
_FOLDERS = {OURS: "ours", DEEPSPEED: "deepspeed", TORCH: "torch"}
_VOCABULARY, _TOKENS = 30_522, 32


def settings_of(args: Any) -> TrainSettings:
    return TrainSettings(
        data=DataSettings(corpus="none"),
        model=ModelSettings(
            hidden_size=args.hidden,
            num_layers=args.layers,
            num_heads=4,
            intermediate_size=4 * args.hidden,
            max_positions=_TOKENS,
            memory_ffn_size=args.hidden,
            key_size=128,
        ),
        optim=OptimSettings(batch_size=2, steps=10),
        runtime=RuntimeSettings(trainers=1, zero_stage=1),
    )


def trained_a_step(settings: TrainSettings) -> TrainingEngine:
    """An engine that has moments."""
    shape = model_config(settings.model, vocab_size=_VOCABULARY, pad_token_id=0)
    engine = TrainingEngine(build_model(shape, seed=1), settings, "cpu")
    engine.train()
    ids_BT = torch.randint(1, _VOCABULARY, (2, _TOKENS))
    labels_BT = ids_BT.masked_fill(torch.rand(ids_BT.shape) > 0.2, -100)
    labels_BT[:, 0] = ids_BT[:, 0]
    engine.forward_backward(input_ids=ids_BT, labels=labels_BT)
    engine.step()
    return engine


def sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


class Ways:
    """The three ways of saving and loading one engine, each with a folder of its own."""

    def __init__(self, engine: TrainingEngine, home: Path) -> None:
        self._engine, self._home = engine, home
        # DeepSpeed's engine, whose own checkpoints are the peer.
        self._wrapped = engine._engine
        self._live = engine.key_weights()
        self._step = 0

    def folder(self, way: str) -> Path:
        return self._home / _FOLDERS[way]

    def save(self, way: str) -> None:
        folder = self.folder(way)
        if way == OURS:
            self._step += 1
            temporary = checkpoints.begin(folder, self._step)
            written = self._engine.save(temporary)
            written.files.update(checkpoints.write_rng(temporary, 0))
            state = CheckpointState(
                step=self._step,
                cursor=Cursor(),
                trainers=1,
                zero_stage=1,
                content_version="none",
                encoder_step=0,
                published_step=0,
                engine=self._engine.counters(),
            )
            checkpoints.commit(folder, state, self._live, [written], keep=1)
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if way == DEEPSPEED:
            self._wrapped.save_checkpoint(str(folder), tag="one")
        else:
            torch.save(
                {
                    "model": self._engine.model.state_dict(),
                    # AdamW's own; DeepSpeed's around it would need a pickle to be read.
                    "optimizer": self._wrapped.basic_optimizer.state_dict(),
                },
                folder / "all.pt",
            )
        sync_files(folder)

    def load(self, way: str) -> None:
        folder = self.folder(way)
        if way == OURS:
            path = checkpoints.latest_checkpoint(folder)
            assert path is not None
            state = checkpoints.read_verified(path)
            self._engine.load(path, state.engine)
        elif way == DEEPSPEED:
            self._wrapped.load_checkpoint(str(folder), tag="one")
        else:
            loaded = torch.load(folder / "all.pt", weights_only=True)
            self._engine.model.load_state_dict(loaded["model"])
            self._wrapped.basic_optimizer.load_state_dict(loaded["optimizer"])

    def bytes(self, way: str) -> int:
        return sum(p.stat().st_size for p in self.folder(way).rglob("*") if p.is_file())


def calls(do: Callable[[str], None]) -> dict[str, Callable[[], float]]:
    return {way: partial(seconds, partial(do, way)) for way in (OURS, DEEPSPEED, TORCH)}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--layers", type=positive, default=6)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument(
        "--directory", type=Path, help="where it is saved; by default a temporary one"
    )
    args = parser.parse_args()
    facts = begin()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        start_process_group("cpu", rank=0, world_size=1, init_method=f"file://{directory}/meeting")
        engine = trained_a_step(settings_of(args))
        ways = Ways(engine, Path(directory))
        parameters = sum(p.numel() for p in engine.model.parameters())
        saved = turn_by_turn(calls(ways.save), repeats=args.repeats)
        loaded = turn_by_turn(calls(ways.load), repeats=args.repeats)
        rows, figures = [], []
        for way in saved:
            size = ways.bytes(way)
            one = {
                "way": way,
                "bytes": size,
                "save_s": Spread.of(saved[way]),
                "load_s": Spread.of(loaded[way]),
                "save_ratio": None,
                "load_ratio": None,
            }
            if way != OURS:
                one["save_ratio"] = spread_of_ratios(saved[OURS], saved[way])
                one["load_ratio"] = spread_of_ratios(loaded[OURS], loaded[way])
            figures.append(one)
            rows.append(
                [
                    way,
                    f"{size / 1e6:,.0f}",
                    one["save_s"].shown(),
                    one["load_s"].shown(),
                    "" if way == OURS else one["save_ratio"].shown(),
                    "" if way == OURS else one["load_ratio"].shown(),
                ]
            )
        stop_process_group()
    print(f"{parameters / 1e6:.1f} million parameters, AdamW, medians (range)\n")
    head = ["", "MB", "save s", "load s", "ours over it, save", "ours over it, load"]
    print(table(head, rows))
    finish(args.json, facts, args, figures)


if __name__ == "__main__":
    main()
