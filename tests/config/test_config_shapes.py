"""Twenty configs of the shapes people publish, each with the expected outcome of every key.

A key that is in none of a shape's lists is honoured, and resolves to the value given unless `resolved` says otherwise.
World size 2, hidden size 64, a bfloat16 model.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest

from tritonspeed.config import ModelFacts, load

AUTO_BATCH = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
BATCH_RESOLVED = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
}
SCALER = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
SCALER_KEYS = [f"fp16.{name}" for name in SCALER]
AUTO_PRECISION = {"fp16": {"enabled": "auto", **SCALER}, "bf16": {"enabled": "auto"}}
PRECISION_RESOLVED = {"fp16.enabled": False, "bf16.enabled": True}
AUTO_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
ADAMW_RESOLVED = {
    "optimizer.params.lr": 1e-3,
    "optimizer.params.betas": (0.9, 0.999),
    "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.0,
}
FLAT = {"allgather_partitions": True, "reduce_scatter": True, "contiguous_gradients": True}
AUTO_SIZES = {
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
}
SIZES_RESOLVED = {
    "zero_optimization.reduce_bucket_size": 4096,
    "zero_optimization.stage3_prefetch_bucket_size": 3686,
    "zero_optimization.stage3_param_persistence_threshold": 640,
}
LIMITS = {"stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9, "sub_group_size": 1e9}
TO_HOST = {"device": "cpu", "pin_memory": True}


def zero(*names):
    return [f"zero_optimization.{name}" for name in names]


@dataclass
class Shape:
    tree: dict[str, Any]
    refused: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)
    inert: list[str] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "smallest": Shape({"train_batch_size": 8}),
    "three numbers": Shape(
        {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    ),
    "trainer, stage 0": Shape(
        AUTO_BATCH
        | AUTO_PRECISION
        | {
            "zero_allow_untested_optimizer": True,
            "zero_optimization": FLAT
            | {
                "stage": 0,
                "overlap_comm": False,
                "allgather_bucket_size": 5e8,
                "reduce_bucket_size": 5e8,
                "round_robin_gradients": True,
            },
        },
        inert=[
            *SCALER_KEYS,
            "zero_allow_untested_optimizer",
            *zero(*FLAT, "overlap_comm", "allgather_bucket_size", "round_robin_gradients"),
        ],
        resolved=BATCH_RESOLVED | PRECISION_RESOLVED,
    ),
    "trainer, stage 1": Shape(
        AUTO_BATCH | AUTO_PRECISION | {"zero_optimization": {"stage": 1, "overlap_comm": True}},
        inert=SCALER_KEYS,
        resolved=BATCH_RESOLVED | PRECISION_RESOLVED,
    ),
    "stage 1 with an old compile block": Shape(
        AUTO_BATCH | {"compile": {"disable": False, "backend": "inductor"}, "zero_optimization": {"stage": 1}},
        inert=["compile.disable", "compile.backend"],
        resolved=BATCH_RESOLVED,
    ),
    "fp16, optimizer and schedule by auto, stage 2": Shape(
        {
            "fp16": {"enabled": True, **SCALER},
            "optimizer": AUTO_ADAMW,
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": dict.fromkeys(
                    ("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"
                ),
            },
            "zero_optimization": FLAT
            | {"stage": 2, "allgather_bucket_size": 2e8, "reduce_bucket_size": "auto", "overlap_comm": True},
            "steps_per_print": 2000,
            "wall_clock_breakdown": False,
        }
        | AUTO_BATCH
        | {"gradient_accumulation_steps": 1},
        inert=zero(*FLAT),
        resolved=BATCH_RESOLVED
        | ADAMW_RESOLVED
        | {
            "zero_optimization.reduce_bucket_size": 4096,
            "scheduler.params.total_num_steps": None,
            "scheduler.params.warmup_min_lr": 0.0,
            "scheduler.params.warmup_max_lr": 1e-3,
            "scheduler.params.warmup_num_steps": 1000,
        },
    ),
    "torch_adam, stage 2": Shape(
        {
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "Adam", "params": {"lr": 3e-5, "torch_adam": True, "adam_w_mode": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-5, "warmup_num_steps": 100}},
            "zero_optimization": {"stage": 2},
        }
    ),
    "stage 2, optimizer on the host": Shape(
        AUTO_BATCH | {"zero_optimization": {"stage": 2, "offload_optimizer": TO_HOST, "overlap_comm": True}},
        resolved=BATCH_RESOLVED,
    ),
    "trainer, stage 3": Shape(
        AUTO_BATCH
        | AUTO_PRECISION
        | {
            "zero_optimization": AUTO_SIZES
            | LIMITS
            | {
                "stage": 3,
                "overlap_comm": False,
                "contiguous_gradients": True,
                "stage3_gather_16bit_weights_on_model_save": "auto",
            }
        },
        inert=[*SCALER_KEYS, *zero("contiguous_gradients")],
        resolved=BATCH_RESOLVED
        | PRECISION_RESOLVED
        | SIZES_RESOLVED
        | {"zero_optimization.stage3_gather_16bit_weights_on_model_save": False},
    ),
    "stage 3 without prefixes, all limits 0": Shape(
        AUTO_BATCH
        | {
            "bf16": {"enabled": True},
            "zero_optimization": AUTO_SIZES
            | {
                "stage": 3,
                "sub_group_size": 0,
                "max_live_parameters": 0,
                "max_reuse_distance": 0,
                "gather_16bit_weights_on_model_save": True,
            },
        },
        resolved=BATCH_RESOLVED | SIZES_RESOLVED,
    ),
    "stage 3, everything on the host": Shape(
        AUTO_BATCH
        | {
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3, "offload_optimizer": TO_HOST, "offload_param": TO_HOST},
        },
        inert=["zero_force_ds_cpu_optimizer"],
        resolved=BATCH_RESOLVED,
    ),
    "stage 3, offload blocks with device none": Shape(
        {
            "train_batch_size": 4,
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "none", "nvme_path": "/local_nvme"},
                "offload_param": {"device": "none", "buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9},
            },
        },
        inert=zero(
            "offload_optimizer.nvme_path",
            "offload_param.buffer_count",
            "offload_param.buffer_size",
            "offload_param.max_in_cpu",
        ),
    ),
    "stage 3 on NVMe with aio": Shape(
        {
            "train_batch_size": 4,
            "aio": {"block_size": 1048576, "queue_depth": 16, "thread_count": 2, "single_submit": False},
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "nvme", "nvme_path": "/n", "pipeline_read": True, "fast_init": False},
            },
        },
        mapped=["aio.thread_count"],
        inert=["aio.single_submit", *zero("offload_optimizer.pipeline_read", "offload_optimizer.fast_init")],
        resolved={"aio.thread_count": 2},
    ),
    "blocks that no DeepSpeed reads": Shape(
        AUTO_BATCH | {"comms_config": {"verbose": False}, "monitor_config": {"enabled": True, "tag": "run"}},
        inert=["comms_config", "monitor_config"],
        resolved=BATCH_RESOLVED,
    ),
    "tensor parallel": Shape(
        AUTO_BATCH
        | {"_comment": "two ranks", "zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}},
        refused=["tensor_parallel.autotp_size"],
        resolved=BATCH_RESOLVED,
    ),
    "of 2020": Shape(
        {
            "train_batch_size": 8,
            "zero_optimization": True,
            "fp32_allreduce": True,
            "allgather_size": 5e8,
            "disable_allgather": False,
            "optimizer": {"type": "Lamb", "params": {"lr": 1e-3, "max_coeff": 10}, "legacy_fusion": False},
        },
        mapped=["zero_optimization", "fp32_allreduce", "allgather_size"],
        inert=["disable_allgather", "optimizer.legacy_fusion"],
        resolved={"zero_optimization": 1, "fp32_allreduce": "fp32"},
    ),
    "of 2021": Shape(
        {
            "train_batch_size": 8,
            "bfloat16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "cpu_offload": True,
                "cpu_offload_params": False,
                "stage3_gather_fp16_weights_on_model_save": True,
            },
        },
        mapped=[
            "bfloat16.enabled",
            *zero("cpu_offload", "cpu_offload_params", "stage3_gather_fp16_weights_on_model_save"),
        ],
        resolved={"zero_optimization.cpu_offload": "cpu", "zero_optimization.cpu_offload_params": "none"},
    ),
    "from an RLHF script": Shape(
        {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 4,
            "steps_per_print": 10,
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "none"},
                "stage3_param_persistence_threshold": 1e4,
                "stage3_max_live_parameters": 3e7,
                "stage3_prefetch_bucket_size": 3e7,
                "memory_efficient_linear": False,
                "zero_quantized_nontrainable_weights": True,
            },
            "fp16": {"enabled": True, "loss_scale_window": 100},
            "gradient_clipping": 1.0,
            "prescale_gradients": False,
            "wall_clock_breakdown": False,
            "hybrid_engine": {"enabled": True, "max_out_tokens": 512, "inference_tp_size": 1},
            "tensorboard": {"enabled": True, "output_path": "logs", "job_name": "actor"},
        },
        refused=["hybrid_engine.enabled", *zero("zero_quantized_nontrainable_weights")],
        inert=[
            "prescale_gradients",
            "hybrid_engine.max_out_tokens",
            "hybrid_engine.inference_tp_size",
            *zero("memory_efficient_linear"),
        ],
    ),
    "quantised communication switched off": Shape(
        {
            "train_micro_batch_size_per_gpu": 2,
            "communication_data_type": "bf16",
            "zero_optimization": {
                "stage": 3,
                "zero_quantized_weights": False,
                "zero_quantized_gradients": False,
                "zero_hpz_partition_size": 1,
                "mics_shard_size": -1,
            },
        }
    ),
    "a tutorial's checkpointing and profiling": Shape(
        {
            "train_micro_batch_size_per_gpu": 2,
            "activation_checkpointing": {
                "partition_activations": False,
                "cpu_checkpointing": False,
                "contiguous_memory_optimization": False,
                "number_checkpoints": None,
                "synchronize_checkpoint_boundary": False,
                "profile": False,
            },
            "flops_profiler": {
                "enabled": True,
                "profile_step": 1,
                "module_depth": -1,
                "top_modules": 1,
                "detailed": True,
            },
            "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "checkpoint": {"tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False},
        },
        inert=[
            "activation_checkpointing.partition_activations",
            *[f"activation_checkpointing.{n}" for n in ("contiguous_memory_optimization", "number_checkpoints")],
            *[f"activation_checkpointing.{n}" for n in ("synchronize_checkpoint_boundary", "profile")],
        ],
    ),
}


def leaves(tree, prefix=""):
    """(dotted key, value) of every value; the blocks that are not checked key by key count as one."""
    for name, value in tree.items():
        if name.startswith("_"):
            continue
        if isinstance(value, dict) and name not in ("comms_config", "monitor_config"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_key_of_the_shape(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load(shape.tree)
    answered = config.resolve(2, ModelFacts(64, "bfloat16"), allow_refused=True).answers()
    got = {
        each.key: (each.given, each.resolved, each.verdict) for each in answered if each.key in dict(leaves(shape.tree))
    }
    expected = {}
    for key, value in leaves(shape.tree):
        lists = {"refused": shape.refused, "mapped": shape.mapped, "inert": shape.inert}
        verdict = next((name for name, keys in lists.items() if key in keys), "honoured")
        expected[key] = (value, shape.resolved.get(key, value), verdict)
    assert got == expected
    if shape.refused:
        with pytest.raises(ValueError) as caught:
            config.resolve(2)
        assert all(f"  {key} = " in str(caught.value) for key in shape.refused)
    else:
        config.resolve(2)
