"""Rows: initialize, engines, optimizers, schedules, configs, and what trains around them."""

from __future__ import annotations

from tritonspeed.integrations.table.reasons import (
    CHUNKED_HEAD,
    CONFIG,
    HYBRID,
    INFERENCE,
    INNER,
    KERNELS,
    LOADER,
    PIPELINE,
    TENSOR_PARALLEL,
    ZENFLOW,
)
from tritonspeed.integrations.table.rows import Rows, here, inert, refused, same, without

_ENGINE, _OPTIM, _OWN = "tritonspeed.engine", "tritonspeed.optim", "tritonspeed.integrations"
_FACTS = "tritonspeed.integrations.facts"
_SCALER = 'the "fp16" block of the config sets the loss scale, and the engine keeps it: engine.optimizer.loss_scale'

_CPU_ADAM = {"DeepSpeedCPUAdam": here(f"{_OWN}.optimizers:DeepSpeedCPUAdam")}
_FUSED_ADAM = {"FusedAdam": here(f"{_OWN}.optimizers:FusedAdam")}
_ADAGRAD = {"DeepSpeedCPUAdagrad": here(f"{_OWN}.optimizers:DeepSpeedCPUAdagrad")}
_CPU_LION = {"DeepSpeedCPULion": here(f"{_OWN}.optimizers:DeepSpeedCPULion")}
_FUSED_LION = {"FusedLion": here(f"{_OWN}.optimizers:FusedLion")}
_MULTI_TENSOR = without(INNER, "multi_tensor_applier")
_LAMB = {"FusedLamb": here(f"{_OWN}.optimizers:FusedLamb")}
_CALLABLES = {
    "DeepSpeedOptimizerCallable": here("typing:Callable", "a type: parameters → optimizer"),
    "DeepSpeedSchedulerCallable": here("typing:Callable", "a type: optimizer → schedule"),
}
_PIPES = without(PIPELINE, "PipelineModule LayerSpec TiedLayerSpec")
_CONFIG_ERRORS = {"DeepSpeedConfigError": here("builtins:ValueError", "what a config that is refused raises")}
_ABOUT = {
    "version": here(f"{_FACTS}:VERSION"),
    "git_hash": here(f"{_FACTS}:GIT_HASH"),
    "git_branch": here(f"{_FACTS}:GIT_BRANCH"),
}

_CHECKPOINTING: Rows = {
    **same(
        "tritonspeed.checkpointing",
        "checkpoint configure is_configured reset CheckpointFunction get_cuda_rng_tracker"
        " model_parallel_cuda_manual_seed",
    ),
    "non_reentrant_checkpoint": here("tritonspeed.checkpointing:checkpoint"),
    "CudaRNGStatesTracker": here("tritonspeed.checkpointing:RandomStates"),
    "set_num_layers": inert(f"{_OWN}.stand_ins:nothing", "no buffer is laid out by a number of layers"),
    "partition_activations_in_checkpoint": inert(
        f"{_OWN}.stand_ins:nothing", "there are no model parallel ranks to split activations over"
    ),
    **without(
        "configure() and checkpoint() do this work inside; use those",
        "contiguous_data_buffers contiguous_size_buffers data_offsets deepspeed_checkpointing_enabled detach_variable"
        " extract_tensors gather_partitioned_activations get_cpu_activations_for_backward"
        " get_offloaded_activations_for_backward get_partition_size get_partition_start"
        " get_partitioned_activations_for_backward is_activation_to_checkpoint merge_tensors"
        " model_parallel_reconfigure_tp_seed mp_group mp_rank mp_size mpu num_layers partition_activations"
        " restore_offloaded_activations size_offsets timers",
    ),
}

MODULES: dict[str, Rows] = {
    "deepspeed": {
        "__version__": here(f"{_FACTS}:VERSION"),
        **_ABOUT,
        **same(_ENGINE, "add_config_arguments"),
        **same(f"{_OWN}.start", "initialize init_distributed"),
        **same(f"{_OWN}.stand_ins", "logger log_dist"),
        **same(f"{_OWN}.accelerator", "get_accelerator"),
        **same(f"{_OWN}.utilities", "OnDevice"),
        "DeepSpeedEngine": here(f"{_ENGINE}:Engine"),
        "DeepSpeedOptimizer": here("tritonspeed.zero:ZeroOptimizer"),
        "TORCH_DISTRIBUTED_DEFAULT_PORT": here(f"{_FACTS}:MASTER_PORT"),
        "MUON_OPTIMIZER": here(f"{_FACTS}:MUON"),
        "dist": here("deepspeed.comm"),
        **_CALLABLES,
        **_CONFIG_ERRORS,
        **without(CONFIG, "DeepSpeedConfig load_ds_config"),
        **without(LOADER, "DeepSpeedDataLoader"),
        **without(HYBRID, "DeepSpeedHybridEngine"),
        **without(PIPELINE, "PipelineModule PipelineEngine DualPipeVEngine DualPipeVModule"),
        **without(INFERENCE, "InferenceEngine DeepSpeedInferenceConfig default_inference_config init_inference"),
        **without(KERNELS, "DeepSpeedTransformerConfig DeepSpeedTransformerLayer replace_transformer_layer"),
        **without(
            TENSOR_PARALLEL,
            "tp_model_init set_autotp_mode merge_tp_model_init_into_config record_tp_model_init_args"
            " resolve_per_head_muon_after_sharding KV MLA_KV MLA_Q NOT_HEAD_BLOCKED QUERY",
        ),
        **without("initialize() marks what Muon updates; mark_hidden_matrices does it by hand", "set_optimizer_flags"),
    },
    "deepspeed.checkpointing": _CHECKPOINTING,
    "deepspeed.constants": {
        "TORCH_DISTRIBUTED_DEFAULT_PORT": here(f"{_FACTS}:MASTER_PORT"),
        "default_pg_timeout": here("torch.distributed.constants:default_pg_timeout"),
    },
    "deepspeed.git_version_info": {
        **_ABOUT,
        "accelerator_name": here(f"{_FACTS}:NO_TEXT", "empty: one build for every device"),
        "installed_ops": here(f"{_FACTS}:NO_OPS", "empty: no op is compiled at installation"),
        "torch_info": refused("`tritonspeed report` says which torch and which devices there are"),
    },
    "deepspeed.ops": {
        **without(KERNELS, "DeepSpeedTransformerConfig DeepSpeedTransformerLayer transformer fp_quantizer"),
    },
    "deepspeed.ops.adam": {
        **_CPU_ADAM,
        **_FUSED_ADAM,
        **without(ZENFLOW, "ZenFlowCPUAdam ZenFlowSelectiveAdamW ZenFlowSelectiveAdamW_stage3"),
    },
    "deepspeed.ops.adam.cpu_adam": _CPU_ADAM,
    "deepspeed.ops.adam.fused_adam": {**_FUSED_ADAM, **_MULTI_TENSOR},
    "deepspeed.ops.adagrad": _ADAGRAD,
    "deepspeed.ops.adagrad.cpu_adagrad": _ADAGRAD,
    "deepspeed.ops.lamb": _LAMB,
    "deepspeed.ops.lamb.fused_lamb": _LAMB,
    "deepspeed.ops.lion": {**_CPU_LION, **_FUSED_LION},
    "deepspeed.ops.lion.cpu_lion": _CPU_LION,
    "deepspeed.ops.lion.fused_lion": {**_FUSED_LION, **_MULTI_TENSOR},
    "deepspeed.pipe": {**_PIPES, **without(PIPELINE, "PipelineEngine DualPipeVModule")},
    "deepspeed.runtime": {},
    "deepspeed.runtime.activation_checkpointing": {},
    "deepspeed.runtime.activation_checkpointing.checkpointing": _CHECKPOINTING,
    "deepspeed.runtime.base_optimizer": {
        "DeepSpeedOptimizer": here("tritonspeed.zero:ZeroOptimizer"),
        "ZeROOptimizer": here("tritonspeed.zero:ZeroOptimizer"),
        **without(INNER, "BackwardHookStateManager"),
    },
    "deepspeed.runtime.bf16_optimizer": without(INNER, "BF16_Optimizer print_rank_0"),
    "deepspeed.runtime.chunked_cross_entropy": without(
        CHUNKED_HEAD,
        "ChunkedCausalLMLoss chunked_cross_entropy install_chunked_causal_lm_loss triton_backend_available",
    ),
    "deepspeed.runtime.config": {
        **_CONFIG_ERRORS,
        **without(
            CONFIG,
            "DeepSpeedConfig DeepSpeedConfigWriter DtypeEnum HybridEngineConfig"
            " get_checkpoint_parallel_write_pipeline get_checkpoint_params get_checkpoint_tag_validation_mode"
            " get_communication_data_type get_data_types_params get_dataloader_drop_last get_disable_allgather"
            " get_disable_python_gc get_dump_state get_expert_data_topo_config get_expert_parallel_config"
            " get_gradient_accumulation_steps get_gradient_allreduce_op get_gradient_clipping"
            " get_gradient_predivide_factor get_hybrid_engine_config get_log_level get_lower_precision_safe_modules"
            " get_managed_gradient_accumulation get_memory_breakdown get_optimizer_gradient_clipping"
            " get_optimizer_legacy_fusion get_optimizer_name get_optimizer_params get_pipeline_config"
            " get_prescale_gradients get_scheduler_name get_scheduler_params get_steps_per_print"
            " get_torch_autocast_dtype get_torch_autocast_enabled get_train_batch_size"
            " get_train_micro_batch_size_per_gpu get_wall_clock_breakdown get_zero_allow_untested_optimizer"
            " get_zero_force_ds_cpu_optimizer",
        ),
    },
    "deepspeed.runtime.dataloader": {
        **same(f"{_OWN}.utilities", "RepeatingLoader"),
        **without(LOADER, "DeepSpeedDataLoader"),
    },
    "deepspeed.runtime.engine": {
        "DeepSpeedEngine": here(f"{_ENGINE}:Engine"),
        **_CALLABLES,
        "MUON_OPTIMIZER": here(f"{_FACTS}:MUON"),
        **without(INNER, "EngineTimers split_half_float_double_sparse"),
    },
    "deepspeed.runtime.fp16": {},
    "deepspeed.runtime.fp16.fused_optimizer": without(INNER, "FP16_Optimizer"),
    "deepspeed.runtime.fp16.loss_scaler": without(
        _SCALER,
        "CreateLossScaler DynamicLossScaler LossScaleConfig LossScaleProfile LossScaleProfileDefaults LossScaler"
        " LossScalerBase to_python_float",
    ),
    "deepspeed.runtime.fp16.unfused_optimizer": without(INNER, "FP16_UnfusedOptimizer"),
    "deepspeed.runtime.hybrid_engine": without(HYBRID, "DeepSpeedHybridEngine"),
    "deepspeed.runtime.lr_schedules": {
        **same(_OPTIM, "VALID_LR_SCHEDULES LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR"),
        **without(
            'write a "scheduler" block into the config; add_config_arguments adds the flags of a script',
            "add_tuning_arguments get_config_from_args get_lr_from_config get_torch_optimizer override_1cycle_params"
            " override_lr_range_test_params override_params override_warmupCosineLR_params override_warmupLR_params"
            " parse_arguments update_lr",
        ),
    },
    "deepspeed.runtime.pipe": {**_PIPES, **without(PIPELINE, "ProcessTopology")},
    "deepspeed.runtime.pipe.engine": without(PIPELINE, "PipelineEngine is_even mem_alloced mem_cached"),
    "deepspeed.runtime.pipe.module": {**_PIPES, **without(PIPELINE, "PipelineError")},
    "deepspeed.runtime.pipe.topology": without(
        PIPELINE, "PipeDataParallelTopology PipeModelDataParallelTopology PipelineParallelGrid ProcessTopology"
    ),
    "deepspeed.runtime.utils": {
        **same(f"{_OWN}.utilities", "move_to_device see_memory_usage empty_cache"),
        "set_random_seed": here(f"{_OWN}.utilities:set_random_seed"),
        "noop_context": here("contextlib:nullcontext"),
        "clip_grad_norm_": refused('"gradient_clipping" in the config clips over all ranks, inside engine.step()'),
        "get_global_norm": refused("engine.get_global_grad_norm() is the norm over all ranks"),
        **without(PIPELINE, "PartitionedTensor partition_balanced partition_uniform prefix_sum_inc call_to_str"),
        **without(
            INNER,
            "CheckOverflow DummyOptim OutputBackwardHookManager TLinear align_dense_tensors all_gather_dp_groups"
            " all_gather_into_tensor_dp_groups check_internal_apis_for_count_used_parameters"
            " clip_tensors_by_global_norm combine_grad_norm_groups compare_tensors_in_structures copy_to_device"
            " count_used_parameters_in_backward ensure_directory_exists filter_empty_parameters"
            " get_checkpoint_folder_size get_flattened_grad_norm get_global_norm_of_tensors get_grad_zeros"
            " get_inactive_params get_ma_status get_norm_with_moe_layers get_norm_with_moe_layers_fast"
            " get_only_unique_item get_tensor_bytes get_weight_norm has_inf_or_nan is_invalid_grad_norm"
            " is_model_parallel_parameter is_optimized_parameter is_transformers_cache"
            " mask_nan_or_inf_with_val_inplace maybe_loss_for_backward mem_alloced mem_cached memory_status"
            " noop_decorator offload_adam_states register_output_backward_hooks reload_adam_states"
            " torch_max_memory_reserved torch_memory_reserved",
        ),
    },
}
