"""The table: every name of DeepSpeed's surface that means something here, and what stands behind it.

A row is an alias (``here``: a native object of the same contract), an alias that needs a word (``inert``: accepted, and
why it changes nothing), or a refusal (``refused``: importable, an error at its first use, with the alternative).
Without torch: ``tritonspeed check --script`` reads it too, and docs/deepspeed-names.md is made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tritonspeed.version import __version__

EMULATED = "0.19.8"
VERSION = f"{EMULATED}+tritonspeed.{__version__}"  # a local version (PEP 440): passes every "at least"

Verdict = Literal["honoured", "inert", "refused"]


@dataclass(frozen=True, slots=True)
class Name:
    """One row.

    Attributes:
        target: "module:attribute" of the object behind the name; None where there is none.
        verdict: what using it does.
        note: why nothing, or what instead.
    """

    target: str | None
    verdict: Verdict
    note: str = ""


def here(target: str, note: str = "") -> Name:
    """A native object under DeepSpeed's name."""
    return Name(target, "honoured", note)


def inert(target: str, note: str) -> Name:
    """Accepted; ``note`` says why it has no effect."""
    return Name(target, "inert", note)


def refused(note: str) -> Name:
    """Not provided; ``note`` says what to do instead."""
    return Name(None, "refused", note)


def _all(module: str, *attributes: str) -> dict[str, Name]:
    """Rows for objects that have the same name on both sides."""
    return {attribute: here(f"{module}:{attribute}") for attribute in attributes}


_ZERO, _ENGINE, _OWN = "tritonspeed.zero", "tritonspeed.engine", "tritonspeed.integrations"
_PIPELINE = "pipeline parallelism is not built: ZeRO stage 3 with offload fits the same models; or use real DeepSpeed"
_ONE_BIT = "1-bit optimizers are not built: use AdamW or LAMB; reduce in bf16 with communication_data_type"
_MICS = "MiCS is not built: use zero.Init and stage 3 over all ranks"
_INFERENCE = "the inference engine is not built yet: under stage 3, model.generate() works on the model itself"
_MOE = "expert parallelism is not built: Hugging Face's mixture-of-experts models train at every stage as they are"

_ACCESS = (
    *("safe_get_full_fp32_param", "safe_get_full_grad", "safe_get_full_optimizer_state"),
    *("safe_get_local_fp32_param", "safe_get_local_grad", "safe_get_local_optimizer_state"),
    *("safe_set_full_fp32_param", "safe_set_full_optimizer_state", "set_z3_leaf_modules"),
)
_CONVERSION = (
    *("get_fp32_state_dict_from_zero_checkpoint", "load_state_dict_from_zero_checkpoint"),
    "convert_zero_checkpoint_to_fp32_state_dict",
)
_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "broadcast_object_list", "gather", "irecv", "isend", "monitored_barrier", "recv"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "send"),
    *("get_rank", "get_world_size", "get_global_rank", "new_group", "destroy_process_group", "ReduceOp"),
)
_PARTITIONING = {
    "Init": here(f"{_ZERO}:Init"),
    "GatheredParameters": here(f"{_ZERO}:GatheredParameters"),
    "ZeroParamStatus": here(f"{_OWN}.parameters:ZeroParamStatus"),
    "register_external_parameter": inert(f"{_OWN}.stand_ins:nothing", "reads from another module are found by hooks"),
    "unregister_external_parameter": inert(f"{_OWN}.stand_ins:nothing", "reads from another module are found by hooks"),
}
_COMM = {
    **_all("torch.distributed", *_COLLECTIVES),
    **_all(f"{_OWN}.start", "init_distributed", "is_initialized", "get_local_rank"),
}

MODULES: dict[str, dict[str, Name]] = {
    "deepspeed": {
        "__version__": here(f"{_OWN}.names:VERSION"),
        **_all(_ENGINE, "initialize", "add_config_arguments"),
        "DeepSpeedEngine": here(f"{_ENGINE}:Engine"),
        "init_distributed": here(f"{_OWN}.start:init_distributed"),
        "get_accelerator": here(f"{_OWN}.stand_ins:get_accelerator"),
        "checkpointing": here("tritonspeed.checkpointing"),
        "PipelineModule": refused(_PIPELINE),
        "PipelineEngine": refused(_PIPELINE),
        "init_inference": refused(_INFERENCE),
        "InferenceEngine": refused(_INFERENCE),
        "tp_model_init": refused("tensor parallelism is not built yet: stage 3 shards parameters over all ranks"),
    },
    "deepspeed.accelerator": {"get_accelerator": here(f"{_OWN}.stand_ins:get_accelerator")},
    "deepspeed.comm": _COMM,
    "deepspeed.comm.comm": _COMM,
    "deepspeed.checkpoint": {},
    "deepspeed.checkpoint.utils": _all(f"{_OWN}.stand_ins", "clone_tensors_for_torch_save"),
    "deepspeed.launcher": {},
    "deepspeed.launcher.runner": {"DEEPSPEED_ENVIRONMENT_NAME": here(f"{_OWN}.stand_ins:DEEPSPEED_ENVIRONMENT_NAME")},
    "deepspeed.module_inject": {},
    "deepspeed.module_inject.layers": {
        "GatherReplacedLayerParams": refused("tensor parallelism is not built yet: no layer is replaced"),
    },
    "deepspeed.moe": {},
    "deepspeed.moe.layer": {"MoE": refused(_MOE)},
    "deepspeed.ops": {},
    "deepspeed.ops.adam": {
        "FusedAdam": here(f"{_OWN}.optimizers:FusedAdam"),
        "DeepSpeedCPUAdam": here(f"{_OWN}.optimizers:DeepSpeedCPUAdam"),
    },
    "deepspeed.ops.adagrad": {"DeepSpeedCPUAdagrad": here("tritonspeed.optim:Adagrad")},
    "deepspeed.ops.lion": {
        "FusedLion": here("tritonspeed.optim:Lion"),
        "DeepSpeedCPULion": here("tritonspeed.optim:Lion"),
    },
    "deepspeed.ops.lamb": {"FusedLamb": here("tritonspeed.optim:Lamb")},
    "deepspeed.pipe": {
        name: refused(_PIPELINE) for name in ("PipelineModule", "LayerSpec", "TiedLayerSpec", "PipelineEngine")
    },
    "deepspeed.runtime": {},
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.checkpointing": _all(
        "tritonspeed.checkpointing", "checkpoint", "configure", "is_configured", "reset"
    ),
    "deepspeed.runtime.base_optimizer": {"DeepSpeedOptimizer": here(f"{_ZERO}:ZeroOptimizer")},
    "deepspeed.runtime.engine": {"DeepSpeedEngine": here(f"{_ENGINE}:Engine")},
    "deepspeed.runtime.fp16": {},
    "deepspeed.runtime.fp16.onebit": {name: refused(_ONE_BIT) for name in ("OnebitAdam", "ZeroOneAdam", "OnebitLamb")},
    "deepspeed.runtime.lr_schedules": {
        **_all(
            "tritonspeed.optim",
            "VALID_LR_SCHEDULES",
            "LRRangeTest",
            "OneCycle",
            "WarmupLR",
            "WarmupDecayLR",
            "WarmupCosineLR",
        ),
    },
    "deepspeed.runtime.sequence_parallel": {},
    "deepspeed.runtime.sequence_parallel.ulysses_sp": {
        name: refused("sequence parallelism is not built: leave sp_size at 1")
        for name in ("UlyssesSPAttentionHF", "UlyssesSPDataLoaderAdapter")
    },
    "deepspeed.runtime.zero": _PARTITIONING,
    "deepspeed.runtime.zero.offload_config": _all(_ZERO, "OffloadDeviceEnum", "OffloadStateTypeEnum"),
    "deepspeed.runtime.zero.partition_parameters": {
        **_PARTITIONING,
        "zero_wrapper_for_fp_tensor_constructor": inert(
            f"{_OWN}.stand_ins:zero_wrapper_for_fp_tensor_constructor", "constructors of tensors are not patched"
        ),
        "_orig_torch_arange": here("torch:arange"),
        "get_accelerator": here(f"{_OWN}.stand_ins:get_accelerator"),
    },
    "deepspeed.utils": {
        **_all(_ZERO, *_ACCESS),
        "logger": here(f"{_OWN}.stand_ins:logger"),
        "log_dist": here(f"{_OWN}.stand_ins:log_dist"),
        **_all(f"{_OWN}.start", "is_initialized"),
    },
    "deepspeed.utils.groups": _all(
        f"{_OWN}.stand_ins",
        *("_get_sequence_parallel_group", "_get_sequence_parallel_world_size", "_get_sequence_parallel_rank"),
    ),
    "deepspeed.utils.logging": _all(f"{_OWN}.stand_ins", "logger", "log_dist"),
    "deepspeed.utils.zero_to_fp32": _all("tritonspeed.checkpoint.zero_to_fp32", *_CONVERSION),
    "deepspeed.zero": {
        **_PARTITIONING,
        "MiCS_Init": refused(_MICS),
        "TiledLinear": refused("tiled linears are not built: stage 3 with offload_param holds one block at a time"),
    },
}

REASONS: dict[str, str] = {
    "deepspeed.pipe": _PIPELINE,
    "deepspeed.runtime.pipe": _PIPELINE,
    "deepspeed.inference": _INFERENCE,
    "deepspeed.moe": _MOE,
    "deepspeed.runtime.fp16.onebit": _ONE_BIT,
    "deepspeed": "nothing here uses it; docs/deepspeed-names.md lists what there is",
}
"""Why what the table has not is not there: by the longest prefix of its name."""


def reason(place: str) -> str:
    """Why ``place``, which the table has not, is not provided."""
    return next(REASONS[p] for p in _prefixes(place) if p in REASONS)


def look_up(place: str) -> Name:
    """The row of a name or module, in full; a refusal where the table has none."""
    if place in MODULES:
        return Name(place, "honoured")
    module, _, attribute = place.rpartition(".")
    row = MODULES.get(module, {}).get(attribute)
    return row or refused(reason(place))


def children(module: str) -> list[str]:
    """Names and submodules of a module of the table, sorted."""
    inner = {name[len(module) + 1 :].partition(".")[0] for name in MODULES if name.startswith(module + ".")}
    return sorted(inner | set(MODULES[module]))


def _prefixes(place: str) -> list[str]:
    parts = place.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
