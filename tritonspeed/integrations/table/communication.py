"""Rows: process groups and collectives, the device, the launcher."""

from __future__ import annotations

from tritonspeed.integrations.table.reasons import BACKENDS, COMMS_LOG
from tritonspeed.integrations.table.rows import Rows, here, inert, refused, same, without

_OWN, _TORCH = "tritonspeed.integrations", "torch.distributed"
_YES = f"{_OWN}.groups:yes"

_COMM: Rows = {
    **same(
        f"{_OWN}.collectives",
        "all_reduce all_gather all_gather_into_tensor all_gather_object all_to_all all_to_all_single barrier broadcast"
        " broadcast_object_list gather irecv isend monitored_barrier recv reduce reduce_scatter reduce_scatter_tensor"
        " scatter send batch_isend_irecv all_reduce_coalesced",
    ),
    **same(
        _TORCH,
        "get_rank get_world_size get_global_rank new_group destroy_process_group is_available ReduceOp P2POp"
        " ProcessGroup",
    ),
    **same(f"{_OWN}.start", "init_distributed is_initialized get_local_rank"),
    **same(f"{_OWN}.groups", "get_world_group"),
    "get_local_rank_from_launcher": here(f"{_OWN}.start:get_local_rank"),
    "get_all_ranks_from_group": here(f"{_TORCH}:get_process_group_ranks"),
    "allgather_fn": here(f"{_OWN}.collectives:all_gather_into_tensor"),
    "reduce_scatter_fn": here(f"{_OWN}.collectives:reduce_scatter_tensor"),
    "inference_all_reduce": here(f"{_OWN}.collectives:all_reduce"),
    "all_gather_coalesced": refused("call all_gather_into_tensor once per tensor, with async_op=True"),
    "default_pg_timeout": here(f"{_TORCH}.constants:default_pg_timeout"),
    "has_all_gather_into_tensor": here(_YES),
    "has_reduce_scatter_tensor": here(_YES),
    "has_all_reduce_coalesced": here(_YES),
    "has_coalescing_manager": here(_YES),
    "configure": inert(f"{_OWN}.stand_ins:nothing", 'the "comms_logger" block of the config is what counts'),
    **same("tritonspeed.profiling", "log_summary reset_log has_comm_data get_comm_operation_count get_logged_comm_ops"),
    **without(COMMS_LOG, "comms_logger timed_op timers timer_summary get_debug_log_name get_msg_size_from_args"),
    **without(
        BACKENDS,
        "cdb ccl_backend hccl_backend mpi_backend nccl_backend init_deepspeed_backend set_backend"
        " enable_symm_mem_for_group get_default_args get_tensor_kwarg get_tensor_position",
    ),
    **without(
        "a launcher's RANK, WORLD_SIZE and MASTER_ADDR say it: start ranks with `tritonspeed run`, torchrun or srun",
        "mpi_discovery in_aml in_aws_sm in_dlts patch_aml_env_for_torch_nccl_backend"
        " patch_aws_sm_env_for_torch_nccl_backend get_world_rank_from_launcher get_world_size_from_launcher",
    ),
    "initialize_mesh_device": refused("there is one mesh axis, data parallel: torch.distributed.init_device_mesh"),
}

GROUPS: Rows = {
    **same(
        f"{_OWN}.groups",
        "get_data_parallel_group get_data_parallel_rank get_data_parallel_world_size get_model_parallel_group"
        " get_model_parallel_rank get_model_parallel_world_size get_tensor_model_parallel_group"
        " get_tensor_model_parallel_rank get_tensor_model_parallel_src_rank get_tensor_model_parallel_world_size",
    ),
    "mpu": here(f"{_OWN}.groups:NO_MPU"),
    "mesh_device": here(f"{_OWN}.groups:NO_MPU"),
    **without(
        "there is one mesh axis, data parallel: a model over several ranks is ZeRO stage 3",
        "initialize set_tensor_model_parallel_rank set_tensor_model_parallel_world_size"
        " expert_tensor_parallel_world_size",
    ),
}
_PRIVATE_GROUPS = {
    "_get_data_parallel_group": here(f"{_OWN}.groups:get_data_parallel_group"),
    "_get_data_parallel_rank": here(f"{_OWN}.groups:get_data_parallel_rank"),
    "_get_data_parallel_world_size": here(f"{_OWN}.groups:get_data_parallel_world_size"),
    "_get_model_parallel_world_size": here(f"{_OWN}.groups:get_model_parallel_world_size"),
    "_get_sequence_data_parallel_group": here(f"{_OWN}.groups:get_data_parallel_group"),
    "_get_sequence_data_parallel_rank": here(f"{_OWN}.groups:get_data_parallel_rank"),
    "_get_sequence_data_parallel_world_size": here(f"{_OWN}.groups:get_data_parallel_world_size"),
    "_get_sequence_parallel_group": here(f"{_OWN}.groups:get_model_parallel_group"),
    "_get_sequence_parallel_rank": here(f"{_OWN}.groups:get_model_parallel_rank"),
    "_get_sequence_parallel_world_size": here(f"{_OWN}.groups:get_model_parallel_world_size"),
}

_ACCELERATOR: Rows = {
    **same(f"{_OWN}.accelerator", "get_accelerator"),
    "DeepSpeedAccelerator": here(f"{_OWN}.accelerator:Accelerator"),
    "is_current_accelerator_supported": here(_YES),
    "set_accelerator": inert(f"{_OWN}.stand_ins:nothing", "the device is torch's: a GPU where it sees one, or the CPU"),
}

MODULES: dict[str, Rows] = {
    "deepspeed.accelerator": _ACCELERATOR,
    "deepspeed.accelerator.abstract_accelerator": {
        "DeepSpeedAccelerator": here(f"{_OWN}.accelerator:Accelerator"),
    },
    "deepspeed.accelerator.real_accelerator": {
        **_ACCELERATOR,
        **without("get_accelerator() answers for the device", "accel_logger ds_accelerator dsa1 dsa2"),
    },
    "deepspeed.comm": _COMM,
    "deepspeed.comm.comm": _COMM,
    "deepspeed.comm.reduce_op": same(_TORCH, "ReduceOp"),
    "deepspeed.launcher": {},
    "deepspeed.launcher.runner": {
        **same(f"{_OWN}.stand_ins", "DEEPSPEED_ENVIRONMENT_NAME"),
        "main": here("tritonspeed.cli.deepspeed_command:main"),
        **without(
            "the command `deepspeed`, or `tritonspeed run --dry-run`, does the launcher's work",
            "apply_num_nodes_and_gpus encode_world_info fetch_hostfile parse_args parse_inclusion_exclusion"
            " parse_node_config parse_node_config_list parse_resource_filter run_autotuning",
        ),
    },
    "deepspeed.utils.groups": {**GROUPS, **_PRIVATE_GROUPS},
}
