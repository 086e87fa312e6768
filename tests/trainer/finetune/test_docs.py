"""docs/finetuning.md: its block opens what was fine-tuned, exactly as it was measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.trainer.finetune.tiny import (
    make_store,
    pet_or_fruit,
    save_pluglm,
    settings,
    task,
    write_rows,
)
from trainer.finetune.run import check, claim, finetune

PAGE = (Path(__file__).parents[3] / "docs" / "finetuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
MEMORIES: dict[str, dict[str, Any]] = {
    "frozen": {"mode": "frozen"},
    "keys of the start": {"mode": "live", "refresh_every_steps": 0},
    "keys of the end": {"mode": "live", "refresh_every_steps": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("page")
    write_rows(home / "train.jsonl", pet_or_fruit(32))
    write_rows(home / "dev.jsonl", pet_or_fruit(8))
    save_pluglm(home / "pluglm")
    make_store(home / "store")
    return home


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_page_opens_the_model_with_the_memory_that_it_was_measured_with(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = settings(
        task("classification", home / "train.jsonl", dev=str(home / "dev.jsonl")),
        home / "pluglm",
        Path("runs/task"),
        memory={"store": str(home / "store"), "top_k": 1} | MEMORIES[kind],
        train={"epochs": 2, "lr": 0.03},
    )
    checked = check(given, say=lambda line: None)
    claim(given, resume=False)
    finetune(given, checked, say=lambda line: None)

    (block,) = BLOCKS
    names: dict[str, Any] = {}
    exec(compile(block, "docs/finetuning.md", "exec"), names)
    tuned = names["tuned"]
    assert tuned.has_memory
    inputs = AutoTokenizer.from_pretrained("runs/task/seed-0/model")(
        [row["text"] for row in pet_or_fruit(8)], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        shares = torch.softmax(tuned(**inputs).logits, -1)
    lines = Path("runs/task/seed-0/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    told = [list(json.loads(line)["probabilities"].values()) for line in lines]
    torch.testing.assert_close(shares, torch.tensor(told), atol=1e-5, rtol=0)
    names["memory"].close()
