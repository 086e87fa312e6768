"""A small task, two domains and models, for the tests of comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.cli import main
from tests.trainer.finetune.tiny import (
    make_store,
    pet_or_fruit,
    save_bert,
    save_pluglm,
    write_rows,
)


@dataclass(frozen=True)
class Home:
    """What lies in a directory: rows, a PlugLM, two plain BERTs and a memory of two domains."""

    path: Path

    def settings(self, *more: str) -> list[str]:
        """`--set` for what both presets have in common, sized for a test."""
        given = [
            f"model.path={self.path / 'pluglm'}",
            f"memory.store={self.path / 'store'}",
            *(f"task.{split}={self.path / split}.jsonl" for split in ("train", "dev", "test")),
            "task.max_length=16",
            "task.metric=accuracy",
            "train.lr=0.005",
            "train.batch_size=8",
            "train.epochs=1",
            "train.seeds=[4, 5]",
            "memory.top_k=2",
            "memory.refresh_every_steps=0",
            *more,
        ]
        return [word for setting in given for word in ("--set", setting)]


def make_home(path: Path) -> Home:
    """Build it; three of the twelve test rows have a training row's text, in other spellings."""
    path.mkdir()
    rows = pet_or_fruit(24)
    write_rows(path / "train.jsonl", rows)
    write_rows(path / "dev.jsonl", pet_or_fruit(32)[24:])
    fresh = [
        {"text": f"who is in {noun}", "label": label}
        for noun, label in (
            ("cat", "pet"), ("apple", "fruit"), ("dog", "pet"), ("pear", "fruit"),
            ("fish", "pet"), ("plum", "fruit"), ("bird", "pet"), ("fig", "fruit"),
            ("cat s", "pet"),
        )
    ]  # fmt: skip
    leaked = [{**row, "text": row["text"].upper() + " "} for row in rows[:3]]
    write_rows(path / "test.jsonl", [*leaked, *fresh])
    save_pluglm(path / "pluglm")
    save_bert(path / "bert")
    save_bert(path / "dapt")
    make_store(path / "store")
    (path / "places.txt").write_text("the cat is in rome\n\nthe fig is in oslo\n\na pear in lima\n")
    tokenizer = ["--tokenizer", str(path / "pluglm")]
    adapt = ["adapt", str(path / "store"), "--name", "places", str(path / "places.txt")]
    assert main([*adapt, *tokenizer]) == 0
    return Home(path)
