"""The `zero_optimization` block: what is sharded, how it is exchanged, and how much of it is resident at once."""

import sys
from dataclasses import dataclass
from typing import Any, Literal

from tritonspeed.config.blocks_offload import OffloadOptimizer, OffloadParam
from tritonspeed.config.keys import above, block, key, present, stage3_only, unless

QUANTIZED_LATER = "quantised communication is not built; set it to false (the exchange is then exact)"
MOE_BLOCKS = ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")


def _stage_note(stage: Any) -> str:
    """shards nothing (0), optimizer states (1), gradients too (2), parameters too (3)"""
    sharded = (
        "nothing",
        "optimizer states",
        "optimizer states and gradients",
        "optimizer states, gradients, parameters",
    )
    return f"shards {sharded[stage]}" if stage in (0, 1, 2, 3) else f"waits for {stage!r}"


def _stage_1_or_2_only(config: Any) -> str | None:
    """acts at stages 1 and 2"""
    stage = config.zero_optimization.stage
    return None if stage in (1, 2) else f"acts at stages 1 and 2, this is stage {stage}"


def _any_stage(config: Any) -> str | None:
    """acts from stage 1 on"""
    return None if config.zero_optimization.stage != 0 else "acts from stage 1 on, this is stage 0"


@dataclass(frozen=True)
class LeafModule:
    """Modules that stage 3 gathers whole instead of descending into: mixtures of experts with routed branches."""

    classes: list[str] = key(list(MOE_BLOCKS), "class names of modules gathered whole", inert=stage3_only)
    names: list[str] = key([], "module paths gathered whole", inert=stage3_only)
    name_suffixes: list[str] = key([], "ends of module paths gathered whole", inert=stage3_only)


@dataclass(frozen=True)
class ZeroOptimization:
    """DeepSpeed's `zero_optimization`. Sizes are numbers of elements, as there."""

    stage: Literal[0, 1, 2, 3] = key(0, _stage_note, always=True)
    overlap_comm: bool | None = key(
        None, "exchange gradients and parameters under compute", auto="true iff stage is 3", inert=_any_stage
    )
    reduce_bucket_size: int = key(
        500_000_000,
        "most elements in one gradient exchange",
        unit="elements",
        auto="hidden size²",
        low=0,
    )
    allgather_bucket_size: int = key(
        500_000_000,
        "most elements in one all-gather of updated parameters",
        unit="elements",
        old=("allgather_size",),
        inert=_stage_1_or_2_only,
        low=0,
    )
    sub_group_size: int = key(
        1_000_000_000,
        "elements the optimizer updates at a time, in multiples of 1,024 from 4,096 on; 0 means all at once",
        unit="elements",
        inert=_any_stage,
        low=0,
    )
    param_persistence_threshold: int = key(
        100_000,
        "parameters with fewer elements stay whole on every rank",
        unit="elements",
        aliases=("stage3_param_persistence_threshold",),
        auto="10 × hidden size",
        inert=stage3_only,
        low=0,
    )
    model_persistence_threshold: int = key(
        sys.maxsize,
        "most elements that may stay whole in all",
        unit="elements",
        aliases=("stage3_model_persistence_threshold",),
        inert=stage3_only,
        low=0,
    )
    prefetch_bucket_size: int = key(
        50_000_000,
        "most elements gathered ahead of use; 0 prefetches nothing",
        unit="elements",
        aliases=("stage3_prefetch_bucket_size",),
        auto="0.9 × hidden size²",
        inert=stage3_only,
        low=0,
    )
    max_live_parameters: int = key(
        1_000_000_000,
        "most gathered elements resident at once",
        unit="elements",
        aliases=("stage3_max_live_parameters",),
        inert=stage3_only,
        low=0,
    )
    max_reuse_distance: int = key(
        1_000_000_000,
        "keep a unit gathered if it is used again within so many elements",
        unit="elements",
        aliases=("stage3_max_reuse_distance",),
        inert=stage3_only,
        low=0,
    )
    gather_16bit_weights_on_model_save: bool = key(
        False,
        "save_16bit_model writes the whole model at stage 3; without it, nothing, and returns False",
        aliases=("stage3_gather_16bit_weights_on_model_save",),
        old=("stage3_gather_fp16_weights_on_model_save", "gather_fp16_weights_on_model_save"),
        inert=stage3_only,
    )
    leaf_module: LeafModule = block(LeafModule, "modules gathered whole")
    ignore_unused_parameters: bool = key(
        True, "false: a trainable parameter without a gradient is an error", old=("find_unused_parameters",)
    )
    offload_optimizer: OffloadOptimizer = block(OffloadOptimizer, "offload of optimizer states")
    offload_param: OffloadParam = block(OffloadParam, "offload of parameters")

    contiguous_gradients: bool = key(
        True, "gradients in one buffer", inert="gradients always live in one flat buffer, without a copy"
    )
    reduce_scatter: bool = key(
        True, "reduce-scatter or all-reduce", inert="sums are the same to the last bit either way; the cheaper one runs"
    )
    allgather_partitions: bool = key(
        True, "all-gather or broadcasts", inert="an all-gather straight into place is always used"
    )
    round_robin_gradients: bool = key(
        False, "spread host copies of gradients over ranks", inert="each rank only ever copies its own shard"
    )
    use_multi_rank_bucket_allreduce: bool = key(
        True, "join the ranks' buckets", inert="a bucket is one exchange for all ranks already"
    )
    load_from_fp32_weights: bool = key(
        True, "masters come from a checkpoint's masters, not from its parameters, which may be rounded"
    )
    elastic_checkpoint: bool = key(
        False, "load at another world size", inert="every checkpoint loads at any world size and stage"
    )
    ignore_missing_optim_state: bool = key(
        False,
        "load a checkpoint that lacks some states",
        inert="a parameter that a checkpoint has no states for starts with none, and that is no error",
    )
    compute_grad_norm: bool = key(
        True, "measure the gradients' norm", inert="it is measured on the way: a non-finite gradient shows in it"
    )
    parameter_alignment: bool = key(
        False, "align parameters in flat buffers", inert="each parameter starts on a 256-byte boundary already"
    )
    legacy_stage1: bool = key(
        False, "the stage 1 of 2020", refuse=unless(False, use="remove it: there is one implementation of stage 1")
    )
    module_granularity_threshold: int = key(
        0,
        "fetch small modules as one",
        unit="elements",
        aliases=("stage3_module_granularity_threshold",),
        inert="a repeated block is one unit of communication already; use leaf_module to join others",
        low=0,
    )
    use_all_reduce_for_fetch_params: bool = key(
        False,
        "gather by all-reduce",
        aliases=("stage3_use_all_reduce_for_fetch_params",),
        inert="an all-gather straight into place is always used",
    )
    allgather_sequential: bool = key(
        False,
        "gather parameters one by one",
        aliases=("stage3_allgather_sequential",),
        inert="a gather needs no temporary buffer here, so there is no peak to lower",
    )
    partition_stream_chunk_size: int = key(
        0,
        "shard huge parameters in pieces",
        unit="elements",
        aliases=("stage3_partition_stream_chunk_size",),
        inert="has no counterpart here",
        low=0,
    )
    memory_efficient_linear: bool = key(
        True, "patched linear layer", inert="no layer is patched; torch saves nothing twice"
    )
    override_module_apply: bool = key(
        True, "gather around module.apply", inert="reading a parameter of a module gathers it, in apply too"
    )
    pipeline_loading_checkpoint: bool = key(
        False,
        "load rank after rank",
        inert="a rank reads its own part, never more than a bucket ahead of it: there is no peak to lower",
    )
    log_trace_cache_warnings: bool = key(
        False,
        "log changes of module order",
        inert="an order that changes is followed silently; ranks that differ raise",
    )
    enable_sanity_checks: bool = key(False, "internal checks", inert="the check that ranks agree always runs")
    save_muon_momentum_buffer_in_memory: bool = key(
        False, "keep Muon's momentum off NVMe", inert="acts only with Muon on nvme, which is refused"
    )
    zero_hpz_partition_size: int = key(
        1,
        "ranks of the secondary, intra-node shard",
        refuse=above(1, use="the secondary shard (hpZ) is not built; set it to 1"),
        low=0,
    )
    zero_quantized_weights: bool = key(False, "int8 all-gather (qwZ)", refuse=unless(False, use=QUANTIZED_LATER))
    zero_quantized_gradients: bool = key(False, "int4 reduction (qgZ)", refuse=unless(False, use=QUANTIZED_LATER))
    zero_quantized_nontrainable_weights: bool = key(
        False,
        "int8 frozen weights",
        refuse=unless(False, use="comes with the quantisation work; set it to false (frozen weights keep their type)"),
    )
    zeropp_loco_param: dict[str, Any] | None = key(
        None, "error feedback of qgZ", inert="acts only with zero_quantized_gradients"
    )
    mics_shard_size: int = key(
        -1,
        "ranks in a MiCS shard group",
        refuse=above(0, use="MiCS is not built; set it to -1 (stage 3 then shards over all ranks)"),
    )
    mics_hierarchical_params_gather: bool = key(
        False, "two-level gather of MiCS", inert="acts only with mics_shard_size above 0"
    )
    zenflow: dict[str, Any] | None = key(
        None,
        "asynchronous updates of unimportant gradients",
        refuse=present("ZenFlow changes the mathematics of a step and is not built; remove the block"),
    )
