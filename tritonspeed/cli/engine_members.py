"""Members of DeepSpeed's engine, optimizers and parameters that the ones here do not have, and what to use instead.

What ours have is read from their sources, so that neither torch nor a model is needed to know it.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from tritonspeed.integrations.table import reasons

PACKAGE = Path(__file__).resolve().parent.parent
CONFIG = "engine.config holds every value of the config, as engine.config.zero_optimization.sub_group_size"
GRADIENTS = "nothing to call: gradients are exchanged in backward(), or in step() at stages 0 and 1"
SAVING = "save_checkpoint() and load_checkpoint() do all of it"
GIVEN = "keep what you gave to initialize()"
ONE_AXIS = "there is one mesh axis, the data-parallel ranks: engine.mesh, or torch.distributed"
MASTERS = "deepspeed.utils.safe_get_full_fp32_param, safe_get_full_grad and their kin read them by parameter"
SCALE = "engine.last_step.loss_scale is the scale; engine.backward(loss) applies it"
NORM = "engine.get_global_grad_norm() after step()"
PIPELINE = "belongs to the pipeline engine: call engine, backward and step"

_ENGINE: dict[str, str] = {
    reasons.LOADER: "deepspeed_io is_map_style_dataset is_iterable_style_dataset first_dataloader_check",
    reasons.METRICS: "summary_events get_summary_writer",
    reasons.TIMERS: "timers tput_timer engine_timers engine_timers_cache get_wall_clock_timers fwd_duration"
    " print_forward_breakdown flops",
    reasons.PROFILER: "flops_profiler",
    reasons.COMPILE: "is_compiled compile_autosp compile_autotp compile_zero_optimization_stage get_autosp_backend"
    " get_autotp_backend get_compile_time get_deepcompile_backend get_deepspeed_compile_backend is_deepcompile_active"
    " is_deepcompile_enabled register_compile_pass uses_parallelization_pass_only",
    reasons.AUTOTUNING: "autotuning_enabled autotuning_end_profile_step autotuning_metric autotuning_metric_path"
    " autotuning_model_info autotuning_model_info_path autotuning_profile_model_info autotuning_start_profile_step",
    reasons.DATA: "curriculum_learning_config curriculum_learning_enabled data_efficiency_config"
    " data_efficiency_enabled data_sampling_config data_sampling_enabled random_ltd_config random_ltd_enabled"
    " random_ltd_initialize random_ltd_scheduler set_custom_curriculum_learning_schedule set_data_post_process_func",
    reasons.MOE: "moe_layers gate_modules has_moe_layers num_experts expert_parallel_group expert_data_parallel_group"
    " load_moe_state_dict",
    reasons.SEQUENCE: "get_sequence_parallel_group sequence_parallel_size seq_data_parallel_group seq_dp_world_size"
    " seq_parallel_group",
    reasons.TENSOR_PARALLEL: "autotp_size tensor_parallel_config get_tensor_parallel_rank",
    reasons.ZENFLOW: "zenflow zenflow_config auto_update",
    reasons.SUPEROFFLOAD: "super_offload cpuadam_cores_perc",
    reasons.LORA: "optimized_linear_base_weight_sharding optimized_linear_lora_enabled",
    reasons.BACKENDS: "dist_backend use_ds_comm",
    PIPELINE: "train_batch eval_batch pipeline_parallelism is_first_stage is_last_stage",
    ONE_AXIS: "mpu mp_world_size get_model_parallel_rank data_parallel_group mesh_device all_to_all_group"
    " local_all_to_all_group checkpoint_mp_rank is_first_weights_partition_group",
    GRADIENTS: "allreduce_gradients allreduce_bucket allreduce_and_copy allreduce_no_retain"
    " buffered_allreduce_fallback enable_backward_allreduce coalesce_grad_reduction inside_no_sync_ctxt"
    " sparse_all_gather sparse_allreduce sparse_allreduce_bucket sparse_allreduce_no_retain all_gather_scalar"
    " gradient_average postscale_gradients scale_wrt_gas warn_unscaled_loss clip_fp32_gradients losses",
    SAVING: "save_non_zero_checkpoint save_zero_checkpoint checkpoint_engine load_universal_checkpoint"
    " loaded_checkpoint_dp_world_size loaded_checkpoint_mp_world_size use_node_local_storage"
    " checkpoint_serialization_enabled checkpoint_tag_validation_enabled checkpoint_tag_validation_fail"
    " checkpoint_writer_enabled",
    GIVEN: "client_optimizer client_lr_scheduler basic_optimizer training_data collate_fn param_names"
    " get_optimizer_configuration",
    SCALE: "dynamic_loss_scale_args initial_dynamic_scale torch_autocast_z0_gradscaler",
    "units are freed after their use; engine.offload_states() frees the rest": "empty_partition_cache",
    "call gc.disable() and gc.collect() yourself": "collect_python_gc",
    CONFIG: "aio_config bf16_master_weights_and_gradients bf16_optimizer_states communication_data_type"
    " fp16_master_weights_and_gradients is_sanity_checks_enabled log_level optimizer_legacy_fusion swap_tensor_config"
    " torch_autocast_dtype torch_autocast_lower_precision_safe_modules zero_allgather_sequential"
    " zero_compute_grad_norm zero_cpu_offload zero_hpz_partition_size zero_legacy_stage1"
    " zero_log_trace_cache_warnings zero_module_granularity_threshold zero_multi_rank_bucket_allreduce"
    " zero_nvme_offload_optimizer zero_parameter_alignment zero_partial_offload zero_quantized_gradients"
    " zero_quantized_nontrainable_weights zero_quantized_weights zero_save_muon_momentum_buffer_in_memory"
    " zero_use_cpu_optimizer",
    reasons.INNER: "dont_change_device flatten unflatten module_forward_pre_hook module_forward_post_hook",
}
_OPTIMIZER: dict[str, str] = {
    MASTERS: "single_partition_of_fp32_groups fp32_partitioned_groups_flat fp32_groups_flat fp16_groups bit16_groups"
    " bit16_groups_flat fp16_partitioned_groups fp16_partitioned_groups_flat averaged_gradients get_full_hp_param"
    " get_fp32_grad_for_param get_local_fp32_param set_full_hp_param",
    SCALE: "cur_scale loss_scaler dynamic_loss_scale override_loss_scale custom_loss_scaler external_loss_scale"
    " backward",
    NORM: "scaled_global_norm unscale_and_clip_grads get_grad_norm_direct clip_grad has_overflow",
    "param_groups holds the rates": "get_lr set_lr",
    "engine.offload_states() and engine.reload_states()": "offload_states reload_states offloaded_states",
}
_PARAMETER: dict[str, str] = {
    "there is no second copy within a node (hpZ is not built): ds_tensor is this rank's part": "ds_secondary_tensor"
    " ds_secondary_tensor_group_size ds_secondary_tensor_num_of_groups",
    "the ranks that share it are ds_process_group's": "ds_zero_param_process_group ds_zero_partition_rank"
    " ds_zero_partition_world_size",
    "fetching is the engine's own work": "ds_grads_remaining ds_inflight_param_registry ds_recompute_parameters"
    " ds_model_granularity ds_numel_aligned",
}


def _by_member(table: dict[str, str]) -> dict[str, str]:
    return {name: note for note, names in table.items() for name in names.split()}


ALTERNATIVES = {
    "engine": _by_member(_ENGINE),
    "optimizer": _by_member(_OPTIMIZER),
    "parameter": _by_member(_PARAMETER),
}
"""Kind of object → member of DeepSpeed's → what to use instead."""


PLAUSIBLE = {"losses", "num_experts", "has_moe_layers", "moe_layers", "gate_modules", "flatten", "timers", "collate_fn"}
"""Members that a user's own module may have too: the engine passes such a name on to it."""


@functools.cache
def members_here(kind: str) -> frozenset[str]:
    """Names that the engine here, its optimizer or a sharded parameter has of its own."""
    if kind == "parameter":
        text = (PACKAGE / "integrations" / "parameters.py").read_text(encoding="utf-8")
        return frozenset(re.findall(r'"(ds_\w+)"', text))
    folder, start = (PACKAGE / "engine", "Engine") if kind == "engine" else (PACKAGE / "zero", "ZeroOptimizer")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    waiting, found = [start], set[str]()
    while waiting:
        node = classes.get(waiting.pop())
        if node is not None:
            waiting += [base.id for base in node.bases if isinstance(base, ast.Name)]
            found |= _names_in(node)
    return frozenset(found)


def _names_in(node: ast.ClassDef) -> set[str]:
    names = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
    for each in ast.walk(node):
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each in node.body:
            names.add(each.target.id)
        elif isinstance(each, ast.Assign) and each in node.body:
            names |= {target.id for target in each.targets if isinstance(target, ast.Name)}
        elif isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self":
            names.add(each.attr)
    return names
