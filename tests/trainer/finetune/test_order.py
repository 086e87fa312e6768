"""The order of an epoch: the same in every process, another in every epoch, each row once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.finetune.tiny import pet_or_fruit, save_bert, settings, task, write_rows
from trainer.finetune.loop import TaskTrainer, make_trainer, training_arguments
from trainer.finetune.order import EpochOrder
from trainer.finetune.run import check
from trainer.finetune.start import build_model

LENGTHS = [3 + number * 7 % 11 for number in range(37)]


def epochs(global_seed: int, count: int = 4, **options: Any) -> list[list[int]]:
    """The orders of the first epochs in a process whose global random state is of its own."""
    torch.manual_seed(global_seed)
    order = EpochOrder(LENGTHS, **options)
    found = []
    for epoch in range(count):
        torch.rand(1 + global_seed)  # as dropout would
        order.set_epoch(epoch)
        found.append(list(order))
    return found


@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("leave_out", [0, 1])
def test_every_process_has_the_same_order(group_size: int, leave_out: int) -> None:
    options = {"seed": 3, "group_size": group_size, "leave_out": leave_out}
    first, second = epochs(0, **options), epochs(5, **options)
    assert first == second
    assert len({tuple(order) for order in first}) == 4
    assert {len(order) for order in first} == {37 - leave_out}
    assert all(max(Counter(order).values()) == 1 for order in first)
    assert len(EpochOrder(LENGTHS, **options)) == 37 - leave_out


def test_the_row_that_is_left_out_is_another_one_each_time() -> None:
    left = [set(range(37)) - set(order) for order in epochs(0, 8, seed=0, leave_out=1)]
    assert len({min(rows) for rows in left}) > 4


def test_seeds_are_different_also_where_seed_and_epoch_have_one_sum() -> None:
    zero, one = epochs(0, seed=0), epochs(0, seed=1)
    assert not {tuple(order) for order in zero} & {tuple(order) for order in one}


def test_rows_of_a_group_are_of_like_length() -> None:
    def spread(order: list[int]) -> float:
        groups = [[LENGTHS[row] for row in order[i : i + 4]] for i in range(0, 36, 4)]
        return sum(max(group) - min(group) for group in groups) / len(groups)

    grouped, mixed = epochs(0, seed=0, group_size=4), epochs(0, seed=0)
    assert max(map(spread, grouped)) < min(map(spread, mixed))


@pytest.mark.parametrize("group_by_length", [True, False])
def test_the_batches_of_training_follow_it(tmp_path: Path, group_by_length: bool) -> None:
    train = write_rows(tmp_path / "train.jsonl", pet_or_fruit(32))
    dev = write_rows(tmp_path / "dev.jsonl", pet_or_fruit(8))
    save_bert(tmp_path / "bert")
    given = settings(
        task("classification", train, dev=str(dev)),
        tmp_path / "bert",
        tmp_path / "run",
        train={"group_by_length": group_by_length, "seeds": (6,)},
    )
    checked = check(given, say=lambda line: None)

    def trainer() -> TaskTrainer:
        return make_trainer(
            given,
            checked.head,
            build_model(checked.start, checked.head, seed=6),
            checked.encoded,
            arguments=training_arguments(
                given, checked.head, work=tmp_path / "work", seed=6, device="cpu"
            ),
            tokenizer=checked.start.tokenizer,
            seed=6,
            leave_out=0,
            say=lambda line: None,
        )

    def batches(global_seed: int) -> list[list[Any]]:
        loader = trainer().get_train_dataloader()
        torch.manual_seed(global_seed)
        # Each iteration is an epoch, as in training.
        return [[batch["input_ids"].tolist() for batch in loader] for _ in range(3)]

    first = batches(1)
    assert first == batches(2)
    assert first[0] != first[1] != first[2]
    assert sum(len(batch) for batch in first[2]) == 32
