"""Settings that contradict each other are refused where they are bundled."""

from __future__ import annotations

import pytest

from trainer.settings import (
    ConfigError,
    DataSettings,
    OptimSettings,
    RuntimeSettings,
    TrainSettings,
)


def settings(*, batch_size: int, trainers: int, micro: int, warmup: int) -> TrainSettings:
    return TrainSettings(
        data=DataSettings(corpus="none"),
        optim=OptimSettings(batch_size=batch_size, retrieval_warmup_steps=warmup),
        runtime=RuntimeSettings(trainers=trainers, micro_batch_size=micro),
    )


@pytest.mark.parametrize(("trainers", "micro"), [(2, 1), (8, 0)])
def test_a_retrieval_warm_up_needs_sequences_to_tell_apart(trainers: int, micro: int) -> None:
    with pytest.raises(ConfigError, match=r"retrieval_warmup_steps = 5: needs at least 2") as told:
        settings(batch_size=8, trainers=trainers, micro=micro, warmup=5)
    assert f"runtime.micro_batch_size = {micro} make it 1" in str(told.value)
    assert settings(batch_size=8, trainers=trainers, micro=micro, warmup=0).micro_batch_size == 1
    assert settings(batch_size=8, trainers=4, micro=2, warmup=5).accumulation_steps == 1
