"""Rows: ZeRO. Parameters that are sharded, and looking at or changing what belongs to them."""

from __future__ import annotations

from tritonspeed.integrations.table.reasons import INNER, MICS, TILED
from tritonspeed.integrations.table.rows import Rows, here, inert, refused, same, without

_ZERO, _OWN = "tritonspeed.zero", "tritonspeed.integrations"
_NOTHING = f"{_OWN}.stand_ins:nothing"
_HOOKS = "reads from another module are found by hooks"

_TILED = without(TILED, "TiledLinear TiledLinearReturnBias")
_PARTITIONING: Rows = {
    **same(_ZERO, "Init GatheredParameters"),
    **same(f"{_OWN}.parameters", "ZeroParamStatus ZeroParamType"),
    "register_external_parameter": inert(_NOTHING, _HOOKS),
    "unregister_external_parameter": inert(_NOTHING, _HOOKS),
}
_ZERO_NAMES: Rows = {
    **_PARTITIONING,
    **_TILED,
    **same(f"{_OWN}.utilities", "unwrap_model_for_generation"),
    **without(MICS, "MiCS_Init"),
    **without(INNER, "DeepSpeedTensorOverride DeepSpeedZeRoOffload"),
}

LEAVES: Rows = {
    **same(
        _ZERO,
        "set_z3_leaf_modules unset_z3_leaf_modules get_z3_leaf_modules set_z3_leaf_module"
        " set_z3_leaf_modules_by_name set_z3_leaf_modules_by_suffix z3_leaf_module",
    ),
    "z3_leaf_parameter": refused("ask get_z3_leaf_modules(model) for the modules, and those for their parameters"),
}
ACCESS: Rows = {
    **same(
        _ZERO,
        "safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state safe_get_local_fp32_param"
        " safe_get_local_grad safe_get_local_optimizer_state safe_set_full_fp32_param safe_set_full_grad"
        " safe_set_full_optimizer_state safe_set_local_fp32_param safe_set_local_grad safe_set_local_optimizer_state"
        " safe_update_full_grad_vectorized",
    ),
    **without(
        "safe_get_full_* and safe_set_full_* read and write what belongs to a parameter",
        "fragment_address get_full_hp_grad get_full_hp_param get_hp_fragment_mapping map_to_flat_opt_states"
        " set_full_hp_grad set_full_hp_param",
    ),
}
_ESTIMATES_2 = same(
    "tritonspeed.estimation",
    "estimate_zero2_model_states_mem_needs estimate_zero2_model_states_mem_needs_all_cold"
    " estimate_zero2_model_states_mem_needs_all_live",
)
_ESTIMATES_3 = same(
    "tritonspeed.estimation",
    "estimate_zero3_model_states_mem_needs estimate_zero3_model_states_mem_needs_all_cold"
    " estimate_zero3_model_states_mem_needs_all_live",
)

MODULES: dict[str, Rows] = {
    "deepspeed.zero": _ZERO_NAMES,
    "deepspeed.runtime.zero": _ZERO_NAMES,
    "deepspeed.runtime.zero.config": {
        **same(f"{_OWN}.utilities", "ZeroStageEnum"),
        **without(
            "tritonspeed.config.load(config).zero_optimization holds the block, key by key",
            "DeepSpeedZeroConfig get_zero_config read_zero_config_deprecated",
        ),
    },
    "deepspeed.runtime.zero.offload_config": {
        **same(_ZERO, "OffloadDeviceEnum OffloadStateTypeEnum"),
        **without(
            "tritonspeed.config.load(config).zero_optimization holds the offload blocks; Python code: ts.Offload",
            "DeepSpeedZeroOffloadOptimizerConfig DeepSpeedZeroOffloadParamConfig",
        ),
    },
    "deepspeed.runtime.zero.parameter_offload": without(
        INNER, "DeepSpeedZeRoOffload ZeROOrderedDict ensure_zero_ordered_dict"
    ),
    "deepspeed.runtime.zero.partition_parameters": {
        **_PARTITIONING,
        "zero_wrapper_for_fp_tensor_constructor": inert(
            f"{_OWN}.stand_ins:zero_wrapper_for_fp_tensor_constructor", "constructors of tensors are not patched"
        ),
        "_orig_torch_arange": here("torch:arange"),
        "get_accelerator": here(f"{_OWN}.accelerator:get_accelerator"),
        "shutdown_init_context": refused("leave the `with zero.Init():` block instead"),
        "restore_init_context": refused("enter `with zero.Init():` again instead"),
        **without(
            INNER,
            "AllGatherCoalescedHandle AllGatherHandle AllReduceCoalescedHandle CUDAQuantizer DeepSpeedTensorOverride"
            " InsertPostInitMethodToModuleSubClasses MultipleAllGatherHandles NoGatherCoalescedHandle NoGatherHandle"
            " QuantizationInfo debug_rank0 empty_buffers free_param get_all_subclasses get_allgather_dtype"
            " get_new_tensor_fn_for_dtype partitioned_param_data_shape print_rank_0 reuse_buffers"
            " temp_contiguous_tensor top_level_context zero_init_context",
        ),
    },
    "deepspeed.runtime.zero.stage3": {
        **_ESTIMATES_3,
        **same(f"{_OWN}.utilities", "DeepSpeedZeroOptimizer_Stage3 unwrap_model_for_generation"),
        **without(INNER, "IPGBucketZ3 input isclose lcm model_to_params move_to_cpu pg_correctness_test print_rank_0"),
    },
    "deepspeed.runtime.zero.stage_1_and_2": {
        **_ESTIMATES_2,
        **same(f"{_OWN}.utilities", "DeepSpeedZeroOptimizer"),
        **without(
            INNER,
            "GradPartitionBufferGroup IPGBucket get_alignment_padding input isclose lcm model_to_params"
            " pg_correctness_test print_rank_msg split_half_float_double",
        ),
    },
    "deepspeed.runtime.zero.tiling": {**_TILED, **without(TILED, "split_tensor_along_last_dim")},
    "deepspeed.runtime.zero.utils": {
        "is_zero_param": here(f"{_OWN}.parameters:is_partitioned"),
        "ZeRORuntimeException": here("builtins:ValueError", "what a checkpoint or config that does not fit raises"),
        "is_zero_supported_optimizer": refused("initialize() takes every elementwise optimizer, and says so if not"),
        **without(
            INNER,
            "apply_to_tensors_only assert_ints_same_as_other_ranks assert_lst_len_same_as_other_ranks defragment"
            " get_lst_from_rank0 get_mapping_to_flat_buffer get_norm_dtype is_builtin_type isinstance_namedtuple"
            " warned",
        ),
    },
    "deepspeed.utils.tensor_fragment": {
        **ACCESS,
        **without("safe_get_full_* and safe_set_full_* read and write what belongs to a parameter", "tensor_fragment"),
    },
    "deepspeed.utils.z3_leaf_module": {
        **LEAVES,
        "apply_zero_leaf_module_config": refused('"leaf_module" in the config\'s zero_optimization is applied anyway'),
    },
}
