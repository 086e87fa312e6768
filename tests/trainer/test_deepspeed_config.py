"""What is handed to DeepSpeed, and what a user's own JSON may and may not change in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.deepspeed_config import deepspeed_config, merge_over
from trainer.deepspeed_values import check_values
from trainer.settings import (
    ConfigError,
    DataSettings,
    OptimSettings,
    RuntimeSettings,
    TrainSettings,
)


def settings(**runtime: Any) -> TrainSettings:
    return TrainSettings(
        data=DataSettings(corpus="somewhere"),
        optim=OptimSettings(batch_size=24, grad_clip=0.5),
        runtime=RuntimeSettings(**{"trainers": 2, "micro_batch_size": 3, **runtime}),
    )


def own_json(tmp_path: Path, content: str) -> TrainSettings:
    path = tmp_path / "own.json"
    path.write_text(content, encoding="utf-8")
    return settings(deepspeed_config=str(path))


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_each_stage_and_precision_is_what_was_asked_for(stage: int, precision: str) -> None:
    given = deepspeed_config(settings(zero_stage=stage, precision=precision), on_gpu=False)
    assert given["zero_optimization"]["stage"] == stage
    enabled = {name for name in ("bf16", "fp16") if given[name]["enabled"]}
    assert enabled == {precision} - {"fp32"}
    assert json.loads(json.dumps(given)) == given


def test_the_batch_is_the_product_that_deepspeed_demands() -> None:
    given = deepspeed_config(settings(), on_gpu=False)
    assert given["train_micro_batch_size_per_gpu"] == 3
    assert given["gradient_accumulation_steps"] == 4
    assert given["train_batch_size"] == 3 * 4 * 2
    assert given["gradient_clipping"] == 0.5


def test_communication_overlaps_only_where_there_are_streams() -> None:
    assert deepspeed_config(settings(), on_gpu=True)["zero_optimization"]["overlap_comm"]
    assert not deepspeed_config(settings(), on_gpu=False)["zero_optimization"]["overlap_comm"]


def test_a_bucket_of_gradients_is_no_larger_than_the_model(tmp_path: Path) -> None:
    def bucket(given: TrainSettings, parameters: int | None) -> int | None:
        made = deepspeed_config(given, on_gpu=True, parameters=parameters)
        size: int | None = made["zero_optimization"].get("reduce_bucket_size")
        return size

    assert bucket(settings(), 35_000_000) == 35_000_000
    assert bucket(settings(), 3_000_000_000) == 500_000_000
    assert bucket(settings(), None) is None
    own = own_json(tmp_path, '{"zero_optimization": {"reduce_bucket_size": 1000}}')
    assert bucket(own, 35_000_000) == 1000


def test_a_users_json_is_merged_over_the_generated_one(tmp_path: Path) -> None:
    own = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
    }
    given = deepspeed_config(own_json(tmp_path, json.dumps(own)), on_gpu=False)
    assert given["zero_optimization"]["reduce_bucket_size"] == 1000
    assert given["zero_optimization"]["contiguous_gradients"] is True
    assert given["wall_clock_breakdown"] is True
    assert given["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("own", "named", "decider"),
    [
        ({"train_batch_size": 64}, "train_batch_size = 64", "optim.batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro", "runtime.micro_batch_size"),
        ({"gradient_accumulation_steps": 1}, "gradient_acc", "runtime.micro_batch_size"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0", "optim.grad_clip"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3", "runtime.zero_stage"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = true", "runtime.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true", "runtime.precision"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer", "optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "optim"),
    ],
)
def test_what_the_runs_settings_decide_is_refused(
    tmp_path: Path, own: dict[str, Any], named: str, decider: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(own_json(tmp_path, json.dumps(own)), on_gpu=False)
    for part in (named, decider, "own.json"):
        assert part in str(caught.value)


def test_all_conflicts_are_named_with_both_sides(tmp_path: Path) -> None:
    own = {"zero_optimization": {"stage": 3}, "gradient_clipping": 2.0}
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(own_json(tmp_path, json.dumps(own)), on_gpu=False)
    told = str(caught.value)
    assert "zero_optimization.stage = 3 there, 2 here, which runtime.zero_stage decides" in told
    assert "gradient_clipping = 2.0 there, 0.5 here, which optim.grad_clip decides" in told


def test_what_is_auto_is_ours_to_decide(tmp_path: Path) -> None:
    own = {"train_batch_size": "auto", "zero_optimization": {"stage": "auto"}}
    given = deepspeed_config(own_json(tmp_path, json.dumps(own)), on_gpu=False)
    assert given == deepspeed_config(settings(), on_gpu=False)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"zero_optimisation": {}}, "DeepSpeed has no key zero_optimisation; did you mean zero_op"),
        ({"zero_optimization": {"reduce_buckets": 1}}, "no key zero_optimization.reduce_buckets"),
        ({"amp": {"enabled": True}}, "DeepSpeed has no key amp"),
        ({"zero_optimization": 3}, "zero_optimization must be a JSON object"),
        ({"managed_gradient_accumulation": False}, "only true is allowed"),
        ({"torch_autocast": {"enabled": True}}, "runtime.precision decides"),
        ({"tensor_parallel": {"autotp_size": 2}}, "it must be left out"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "only false is allowed"),
        ({"zero_optimization": {"cpu_offload": True}}, "runtime.offload_optimizer and"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "runtime.offload_opt"),
        ({"zero_optimization": {"offload_param": {"max_in_cpu": 5}}}, "which is of stage 3"),
        ({"zero_optimization": {"stage3_max_live_parameters": 5}}, "runtime.zero_stage = 2"),
        ({"bf16": {"check_grad_overflow": False}}, "only true is allowed"),
        ({"zero_allow_untested_optimizer": False}, "false there, true here"),
    ],
)
def test_slips_and_contradictions_are_refused(
    tmp_path: Path, own: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(own_json(tmp_path, json.dumps(own)), on_gpu=False)
    assert said in str(caught.value)
    assert "own.json" in str(caught.value)


def test_gradients_that_are_summed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_allreduce_op": "sum"}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"gradient_allreduce_op.*mean"):
        deepspeed_config(settings(deepspeed_config=str(path)), on_gpu=False)


def test_the_same_said_in_other_words_is_no_contradiction(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    given = {
        "bfloat16": {"enabled": True},
        "zero_optimization": {"offload_optimizer": {"device": "none"}},
    }
    path.write_text(json.dumps(given), encoding="utf-8")
    made = deepspeed_config(settings(precision="bf16", deepspeed_config=str(path)), on_gpu=False)
    assert made["bf16"]["enabled"] is True
    assert "bfloat16" not in made
    assert "offload_optimizer" not in made["zero_optimization"]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"fp16": {"loss_scle": 1}}, "fp16.loss_scle = 1: Extra inputs are not permitted"),
        ({"zero_optimization": {"reduce_bucket_size": -5}}, "reduce_bucket_size = -5: Input"),
        ({"zero_optimization": {"overlap_comm": "yes please"}}, 'overlap_comm = "yes please"'),
    ],
)
def test_values_are_what_deepspeed_takes(tmp_path: Path, own: dict[str, Any], said: str) -> None:
    made = deepspeed_config(own_json(tmp_path, json.dumps(own)), on_gpu=False)
    with pytest.raises(ConfigError) as caught:
        check_values(made, "own.json")
    assert said in str(caught.value)
    check_values(deepspeed_config(settings(), on_gpu=False), "ours")


def test_what_is_offloaded_goes_where_the_settings_say() -> None:
    given = deepspeed_config(
        settings(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu"), on_gpu=True
    )
    zero = given["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "offload_optimizer" not in deepspeed_config(settings(), on_gpu=True)["zero_optimization"]


def test_nvme_is_refused_where_there_is_no_gpu_and_configured_where_there_is() -> None:
    on_nvme = settings(zero_stage=3, offload_optimizer="nvme", nvme_path="/fast")
    zero = deepspeed_config(on_nvme, on_gpu=True)["zero_optimization"]
    assert zero["offload_optimizer"]["nvme_path"] == "/fast"
    with pytest.raises(ConfigError, match="needs GPUs and DeepSpeed's async_io operator"):
        deepspeed_config(on_nvme, on_gpu=False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "not valid JSON"), ("[1]", "must hold a JSON object"), ("3", "must hold a JSON object")],
)
def test_a_bad_json_is_named(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"own.json: {reason}"):
        deepspeed_config(own_json(tmp_path, content), on_gpu=False)


def test_a_missing_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    with pytest.raises(ConfigError, match=r"missing\.json: cannot be read: No such file"):
        deepspeed_config(settings(deepspeed_config=str(path)), on_gpu=False)


def test_merging_changes_neither_side() -> None:
    base: dict[str, Any] = {"a": {"b": 1, "c": 2}, "d": 3}
    over: dict[str, Any] = {"a": {"b": 9}, "d": {"e": 4}}
    assert merge_over(base, over) == {"a": {"b": 9, "c": 2}, "d": {"e": 4}}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    assert over == {"a": {"b": 9}, "d": {"e": 4}}
