"""What a user's DeepSpeed JSON may say: keys that exist, and nothing that the engine cannot do.

DeepSpeed ignores top-level keys that it does not know, so a slip of the pen would do nothing, and
some of its features need another model, another optimizer or other checkpoints than ours.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from trainer.settings import ConfigError

# Of DeepSpeed 0.19.
_TOP = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "expert_parallel",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "hybrid_engine",
        "load_universal",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "monitor_config",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "steps_per_print",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "use_node_local_storage",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)
_ZERO = frozenset(
    [
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ]
)

_OWN_LOOP = "the trainer's loop does not know of it"
_OWN_STATE = "checkpoints of this project hold float32 weights and moments of whole parameters"
_OWN_DATA = "the run's own data section decides which batches come"
_OFFLOAD = "runtime.offload_optimizer and runtime.offload_parameters are the settings for it"
# A path of keys, the only values that are allowed there, and why.
_ONLY: tuple[tuple[tuple[str, ...], tuple[Any, ...], str], ...] = (
    (("gradient_allreduce_op",), ("mean",), "the loss is a mean over all masks of all ranks"),
    (("torch_autocast", "enabled"), (False,), "runtime.precision decides the number format"),
    (("managed_gradient_accumulation",), (True,), _OWN_LOOP),
    (("compile", "deepcompile"), (False,), _OWN_LOOP),
    (("hybrid_engine", "enabled"), (False,), _OWN_LOOP),
    (("tensor_parallel",), (), "the model is not cut over trainers"),
    (("expert_parallel",), (), "the model has no experts"),
    (("sequence_parallel_size",), (1,), "the model is not cut over trainers"),
    (("weight_quantization",), (), _OWN_STATE),
    (("data_efficiency", "enabled"), (False,), _OWN_DATA),
    (("bf16", "bf16_master_weights_and_grads"), (False,), _OWN_STATE),
    (("bf16", "bf16_optimizer_states"), (False,), _OWN_STATE),
    (("fp16", "fp16_master_weights_and_grads"), (False,), _OWN_STATE),
    (("fp16", "auto_cast"), (False,), "the model casts where that is needed"),
    (("bf16", "check_grad_overflow"), (True,), "a step that is not finite is to be left out"),
    (("zero_optimization", "compute_grad_norm"), (True,), "the norm tells what is not finite"),
    (("zero_optimization", "round_robin_gradients"), (False,), _OWN_STATE),
    (("zero_optimization", "zenflow"), (None,), _OWN_STATE),
    (("zero_optimization", "zero_hpz_partition_size"), (1,), _OWN_STATE),
    (("zero_optimization", "zero_quantized_weights"), (False,), _OWN_STATE),
    (("zero_optimization", "zero_quantized_nontrainable_weights"), (False,), _OWN_STATE),
    (("zero_optimization", "legacy_stage1"), (False,), "DeepSpeed has it no more"),
    (("zero_optimization", "cpu_offload"), (False, None), _OFFLOAD),
    (("zero_optimization", "cpu_offload_param"), (False, None), _OFFLOAD),
    (("zero_optimization", "offload_optimizer", "super_offload"), (False,), _OWN_STATE),
    (("zero_optimization", "offload_optimizer", "ratio"), (1, 1.0), _OWN_STATE),
)


def check_keys(given: dict[str, Any], file: str) -> None:
    """Refuse keys that DeepSpeed does not have.

    Args:
        given: the user's JSON.
        file: what to call it.

    Raises:
        ConfigError: names the key and the nearest that there is.
    """
    _check_known(given, _TOP, "", file)
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{file}: zero_optimization must be a JSON object")
    _check_known(zero, _ZERO, "zero_optimization.", file)


def check_supported(merged: dict[str, Any], file: str) -> None:
    """Refuse what the engine cannot do, and settings that contradict each other.

    Raises:
        ConfigError: names the key, what is allowed and why.
    """
    for keys, allowed, why in _ONLY:
        found: Any = merged
        for key in keys:
            found = found.get(key, _ABSENT) if isinstance(found, dict) else _ABSENT
        if found is _ABSENT or found in allowed:
            continue
        values = " or ".join(json.dumps(value) for value in allowed)
        advice = f"only {values} is allowed" if allowed else "it must be left out"
        raise ConfigError(f"{file} sets {'.'.join(keys)} = {json.dumps(found)}: {advice}: {why}")
    zero = merged["zero_optimization"]
    for key in zero:
        late = key.startswith("stage3_") and key != "stage3_param_persistence_threshold"
        if (late or key == "offload_param") and zero["stage"] != 3:
            raise ConfigError(
                f"{file} sets zero_optimization.{key}, which is of stage 3, but "
                f"runtime.zero_stage = {zero['stage']}"
            )


class _Absent:
    """No value, where None is one."""


_ABSENT = _Absent()


def _check_known(given: Iterable[str], known: frozenset[str], prefix: str, file: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"{file}: DeepSpeed has no key {prefix}{key}{hint}")
