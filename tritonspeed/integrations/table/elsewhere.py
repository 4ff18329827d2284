"""Rows: utilities, checkpoints on disk, and what belongs to features that are not built."""

from __future__ import annotations

from tritonspeed.integrations.table.communication import GROUPS
from tritonspeed.integrations.table.partitioning import ACCESS, LEAVES
from tritonspeed.integrations.table.reasons import (
    AUTOTUNING,
    CHECKPOINTS,
    INFERENCE,
    INNER,
    LORA,
    METRICS,
    MOE,
    OPS,
    SEQUENCE,
    TENSOR_PARALLEL,
    TIMERS,
)
from tritonspeed.integrations.table.rows import Rows, here, inert, refused, same, without

_OWN = "tritonspeed.integrations"
_UTILITIES = f"{_OWN}.utilities"

_LOGGING: Rows = {
    **same(f"{_OWN}.stand_ins", "logger log_dist"),
    **same(_UTILITIES, "log_dist_once set_log_level_from_string warning_once"),
}
_PROFILER: Rows = {
    **same(
        "tritonspeed.profiling.flops_profiler",
        "FlopsProfiler get_model_profile bytes_to_string duration_to_string flops_to_string macs_to_string"
        " number_to_string params_to_string",
    ),
    "Tensor": here("torch:Tensor"),
    **without(
        "figures are not kept in modules: FlopsProfiler(model).profile.rows has those of every module",
        "get_module_duration get_module_flops get_module_macs module_flop_count module_mac_count old_functions"
        " wrapFunc",
    ),
}
_CHECKPOINT_NAMES = "get_layer_ckpt_name_for_rank get_model_ckpt_name_for_rank get_zero_ckpt_name_for_rank"

MODULES: dict[str, Rows] = {
    "deepspeed.autotuning": without(AUTOTUNING, "Autotuner"),
    "deepspeed.checkpoint": without(
        CHECKPOINTS,
        "DeepSpeedCheckpoint SubparamShape ZeROCheckpoint enable_universal_checkpoint get_model_3d_descriptor"
        f" merge_state model_3d_desc reshape_meg_2d_parallel {_CHECKPOINT_NAMES}",
    ),
    "deepspeed.checkpoint.utils": {
        **same(f"{_OWN}.stand_ins", "clone_tensors_for_torch_save"),
        **without(CHECKPOINTS, _CHECKPOINT_NAMES),
    },
    "deepspeed.env_report": without(
        "`tritonspeed report` says what this machine has and what works on it",
        "cli_main color_len debug_report get_shm_size human_readable_size installed_cann_path installed_cann_version"
        " main nvcc_version okay op_report parse_arguments warning",
    ),
    "deepspeed.inference": {},
    "deepspeed.inference.config": without(
        INFERENCE,
        "ActivationQuantConfig BaseQuantConfig DeepSpeedInferenceConfig DeepSpeedMoEConfig DeepSpeedTPConfig DtypeEnum"
        " InferenceCheckpointConfig MoETypeEnum QKVQuantConfig QuantTypeEnum QuantizationConfig WeightQuantConfig",
    ),
    "deepspeed.inference.engine": without(INFERENCE, "InferenceEngine"),
    "deepspeed.linear": without(LORA, "Init LoRAConfig OptimizedLinear QuantizationConfig init_lora"),
    "deepspeed.module_inject": without(
        TENSOR_PARALLEL,
        "AutoTPConfig AutoTPPresets DSPolicy EmbeddingLayer GroupQuantizer HFBertLayerPolicy LinearAllreduce"
        " LinearLayer Normalize PartitionType ReplaceWithTensorSlicing SubParamLinearAllreduce SubParamLinearLayer"
        " TPLayerSpec generic_injection merge_autotp_configs quantize_transformer_layer replace_transformer_layer"
        " revert_transformer_layer set_autotp_mode",
    ),
    "deepspeed.module_inject.layers": without(
        TENSOR_PARALLEL,
        "AsyncColumnParallel ColumnParallel Conv_LinearALlreduce EmbeddingLayer FusedModuleWrapper"
        " GateUpPack_LinearLayer GatherFromTensorParallelRegion GatherReplacedLayerParams HiddenParallelEmbedding"
        " LinearAllreduce LinearAllreduceWithReplicatedInput LinearLayer LmHeadLinearAllreduce Normalize OPTEmbedding"
        " RMSNormalize RowParallel ScatterToTensorParallelRegion SubParamColumnParallel SubParamLinearAllreduce"
        " SubParamLinearLayer TensorParallelConv2d TensorParallelIcShardConv2d TensorParallelOcShardConv2d"
        " TensorParallel_Layer VocabParallelEmbedding VocabParallelLinear Yuan_LinearAllreduce Yuan_LinearLayer"
        " add_bias collect_autotp_universal_checkpoint_info configure_tensor_parallel_runtime conv_LinearLayer"
        " fused_LinearLayer get_auto_tp_mode is_autotp_training_mode set_autotp_mode",
    ),
    "deepspeed.moe": {},
    "deepspeed.moe.layer": without(MOE, "MoE"),
    "deepspeed.moe.utils": {
        "is_moe_param": here(f"{_OWN}.groups:no"),
        "is_moe_param_group": here(f"{_OWN}.groups:no"),
        "has_moe_layers": here(f"{_UTILITIES}:has_moe_layers"),
        **without(
            MOE,
            "configure_moe_param_groups split_params_grads_into_shared_and_expert_params"
            " split_params_into_different_moe_groups_for_optimizer split_params_into_shared_and_expert_params",
        ),
    },
    "deepspeed.monitor": {},
    "deepspeed.monitor.config": {
        **same("tritonspeed.monitor", "get_monitor_config"),
        **without(METRICS, "CSVConfig CometConfig DeepSpeedMonitorConfig TensorBoardConfig WandbConfig"),
    },
    "deepspeed.monitor.monitor": {
        **same("tritonspeed.monitor", "MonitorMaster"),
        **without("engine.monitor.write_events() writes to all monitors that the config enables", "Monitor"),
    },
    "deepspeed.ops.op_builder": without(
        OPS, "OpBuilder builder_closure get_default_compute_capabilities op_builder_dir this_module"
    )
    | without(
        OPS,
        "AsyncIOBuilder CPUAdagradBuilder CPUAdamBuilder CPULionBuilder EvoformerAttnBuilder FPQuantizerBuilder"
        " FusedAdamBuilder FusedLambBuilder FusedLionBuilder GDSBuilder InferenceBuilder InferenceCoreBuilder"
        " InferenceCutlassBuilder QuantizerBuilder RaggedOpsBuilder RaggedUtilsBuilder RandomLTDBuilder"
        " ShareMemCommBuilder SpatialInferenceBuilder StochasticTransformerBuilder TransformerBuilder UtilsBuilder",
    ),
    "deepspeed.profiling": {},
    "deepspeed.profiling.flops_profiler": _PROFILER,
    "deepspeed.profiling.flops_profiler.profiler": _PROFILER,
    "deepspeed.runtime.sequence_parallel": {},
    "deepspeed.runtime.sequence_parallel.ulysses_sp": without(
        SEQUENCE,
        "AutogradComputeMLP SequenceTiledCompute TiledFusedLogitsLoss TiledMLP UlyssesSPAttentionHF"
        " UlyssesSPDataLoaderAdapter sequence_tiled_compute",
    ),
    "deepspeed.sequence": without(
        SEQUENCE,
        "InternVLFusionAdapter LlavaFusionAdapter ModalityFusionSPAdapter Qwen2VLFusionAdapter SPModelInfo"
        " UlyssesSPViTAttention VocabParallelCausalLMLoss VocabParallelCrossEntropyLoss auto_wrap_model_for_sp"
        " configure_vocab_parallel_loss detect_model_sp_info vocab_parallel_cross_entropy",
    ),
    "deepspeed.sequence.layer": without(
        SEQUENCE,
        "DistributedAttention apply_rotary_pos_emb post_all2all pre_all2all_fun register_all_to_all_group"
        " single_all_to_all uneven_heads_all2all",
    ),
    "deepspeed.utils": {
        **ACCESS,
        **LEAVES,
        **GROUPS,
        **_LOGGING,
        **same(f"{_OWN}.start", "is_initialized"),
        **same(f"{_OWN}.accelerator", "get_accelerator"),
        **same(_UTILITIES, "OnDevice RepeatingLoader"),
        "instrument_w_nvtx": inert(f"{_UTILITIES}:unchanged", "a run's trace is engine.trace(steps)"),
        "DeprecatedException": here("builtins:DeprecationWarning"),
        **without(
            INNER,
            "get_caller_func get_numactl_cmd lazy_init_hp_params_optimizer_state link_hp_params recursive_getattr"
            " recursive_setattr",
        ),
    },
    "deepspeed.utils.init_on_device": same(_UTILITIES, "OnDevice"),
    "deepspeed.utils.logging": {
        **_LOGGING,
        "log_levels": here(f"{_UTILITIES}:LOG_LEVELS"),
        **without(
            "`logger` is an ordinary logging.Logger, named tritonspeed",
            "LoggerFactory get_current_level get_dist_msg get_log_level_from_string print_configuration print_dist"
            " print_json_dist should_log_le",
        ),
    },
    "deepspeed.utils.nvtx": {
        "instrument_w_nvtx": inert(f"{_UTILITIES}:unchanged", "a run's trace is engine.trace(steps)"),
        "enable_nvtx": refused("a run's trace is engine.trace(steps)"),
    },
    "deepspeed.utils.timer": without(
        TIMERS, "CudaEventTimer NoopTimer SynchronizedWallClockTimer ThroughputTimer trim_mean"
    ),
    "deepspeed.utils.zero_to_fp32": {
        **same(
            "tritonspeed.checkpoint.zero_to_fp32",
            "get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint"
            " convert_zero_checkpoint_to_fp32_state_dict convert_zero_checkpoint_to_state_dict",
        ),
        **same(
            f"{_OWN}.zero_files",
            "get_model_state_file get_optim_files",
        ),
        "main": here("tritonspeed.cli.zero_to_fp32:main", "python -m deepspeed.utils.zero_to_fp32"),
        "GatheredTensor": here("tritonspeed.checkpoint.zero_to_fp32:LazyTensor"),
        "debug": here(f"{_OWN}.facts:NO_DEBUG"),
        **without(
            "get_fp32_state_dict_from_zero_checkpoint reads a whole checkpoint, DeepSpeed's and tritonspeed's alike",
            "args atoi device get_checkpoint_files get_model_state_files natural_keys parse_model_states"
            " parse_optim_states parser to_torch_tensor zero3_partitioned_param_info zero_model_state",
        ),
    },
}
