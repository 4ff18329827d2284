"""ZeRO: a training step as a loop over shards.

Bottom up: ``stages`` what is sharded (a table) · ``layout`` where every element is (integers) · ``plan`` which
parameter belongs to which unit · ``options`` what the config says of it · ``bucket`` one flat buffer over the ranks ·
``group`` one unit at run time · ``order`` what comes next · ``reduce`` gradients leave in a fixed order · ``guard``
what a sharded module shows · ``hooks`` when all this happens · ``parameter_offload`` hooks off, hooks on · ``step`` the
optimizer over chunks · ``tensor_files`` what is in a checkpoint · ``load``, ``meta``, ``init`` where values come from ·
``gathered``, ``access`` looking and changing · ``leaves`` what is not split · ``away`` states put away between phases ·
``shard`` the parts together.
"""

from tritonspeed.zero.access import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    safe_update_full_grad_vectorized,
)
from tritonspeed.zero.away import Away, OffloadDeviceEnum, OffloadStateTypeEnum
from tritonspeed.zero.gathered import GatheredParameters
from tritonspeed.zero.init import Init
from tritonspeed.zero.leaves import (
    get_z3_leaf_modules,
    set_z3_leaf_module,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules,
    z3_leaf_module,
)
from tritonspeed.zero.load import load_safetensors
from tritonspeed.zero.meta import apply_later
from tritonspeed.zero.options import ShardOptions
from tritonspeed.zero.order import Limits
from tritonspeed.zero.parameter_offload import ParameterOffload
from tritonspeed.zero.plan import LeafRules
from tritonspeed.zero.shard import ShardedModel, shard
from tritonspeed.zero.step import StepFacts, ZeroOptimizer

__all__ = [
    "Away",
    "GatheredParameters",
    "Init",
    "LeafRules",
    "Limits",
    "OffloadDeviceEnum",
    "OffloadStateTypeEnum",
    "ParameterOffload",
    "ShardOptions",
    "ShardedModel",
    "StepFacts",
    "ZeroOptimizer",
    "apply_later",
    "get_z3_leaf_modules",
    "load_safetensors",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "shard",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
]
