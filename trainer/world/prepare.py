"""Everything that a run on the synthetic world needs, made once and found again on resume."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from trainer.corpus.tokenizer import load_tokenizer, tokenizer_fingerprint
from trainer.export import write_json
from trainer.settings import ConfigError, TrainSettings
from trainer.world.facts import FACTS_PER_WORLD
from trainer.world.store import build_world_store
from trainer.world.task import WorldTask, worlds_needed
from trainer.world.tokenizer import PAD, VOCABULARY, save_world_tokenizer, world_tokenizer

WORLD_FORMAT = "pluglm-world-1"
WORLD = "world"
_MANIFEST = "world.json"


class PreparedWorld(NamedTuple):
    """What `prepare_world` made, or found.

    Attributes:
        task: to train on. The memory must start with ``task.content_version(0)``; the store's head
            is the world of new facts.
        store: directory of the memory's store.
        tokenizer: directory that `AutoTokenizer.from_pretrained` loads.
        vocab_size, pad_token_id: of the tokenizer.
    """

    task: WorldTask
    store: Path
    tokenizer: Path
    vocab_size: int
    pad_token_id: int


def prepare_world(run_dir: Path, config: TrainSettings) -> PreparedWorld:
    """Make the worlds, their store and the tokenizer in ``run_dir/world``, or find them there.

    The manifest is written last, so a half-made world is made again.

    Args:
        run_dir: the run's directory.
        config: its settings; the seed, the steps and the steps between refreshes decide the worlds.

    Raises:
        ConfigError: there is a world already, for another seed or other numbers of steps.
    """
    place = run_dir / WORLD
    store, tokenizer = place / "memory", place / "tokenizer"
    task = _found(place, store)
    wanted = {
        "run.seed": config.run.seed,
        "optim.steps": config.optim.steps,
        "memory.refresh_every_steps": config.memory.refresh_every_steps,
    }
    if task is None:
        task = _made(place, store, tokenizer, config)
    else:
        have = (task.seed, task.steps, task.refresh_every_steps)
        for (key, value), there in zip(wanted.items(), have, strict=True):
            if value != there:
                raise ConfigError(
                    f"{key} = {value}: the world in {place} was made with {there}; keep that, or "
                    "choose another run.dir"
                )
    return PreparedWorld(task, store, tokenizer, len(VOCABULARY), PAD)


def _made(place: Path, store: Path, tokenizer: Path, config: TrainSettings) -> WorldTask:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    steps, every = config.optim.steps, config.memory.refresh_every_steps
    fingerprint = save_world_tokenizer(tokenizer)
    versions = build_world_store(
        store,
        worlds=worlds_needed(steps, every) + 1,
        seed=config.run.seed,
        size=FACTS_PER_WORLD,
        tokenizer_fingerprint=fingerprint,
    )
    task = WorldTask(
        store=store,
        versions=tuple(versions),
        seed=config.run.seed,
        size=FACTS_PER_WORLD,
        refresh_every_steps=every,
        steps=steps,
    )
    values = asdict(task)
    del values["store"]
    manifest = {"format": WORLD_FORMAT, "tokenizer_fingerprint": fingerprint, "task": values}
    write_json(place / _MANIFEST, manifest)
    return task


def _found(place: Path, store: Path) -> WorldTask | None:
    """The world that is there, or None where it is missing or half-made."""
    path = place / _MANIFEST
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        ours = tokenizer_fingerprint(world_tokenizer())
        theirs = tokenizer_fingerprint(load_tokenizer(place / "tokenizer"))
        if raw["format"] != WORLD_FORMAT or not raw["tokenizer_fingerprint"] == theirs == ours:
            raise ValueError("it is of another version of this program")
        values = raw["task"]
        return WorldTask(store=store, **{**values, "versions": tuple(values["versions"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the world in {place} cannot be used ({error}); remove that directory and start anew"
        ) from error
