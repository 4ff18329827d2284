"""The questions that DeepSpeed's engine answers, by their names there. Nothing is decided here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonspeed import comm
from tritonspeed.config.keys import value_at
from tritonspeed.estimation import Achieved, Machine, achieved, calibrate

if TYPE_CHECKING:
    from tritonspeed.comm import Mesh
    from tritonspeed.config import Config
    from tritonspeed.engine.report import StepReport
    from tritonspeed.precision import Policy
    from tritonspeed.zero import Away, ParameterOffload, ShardedModel, ZeroOptimizer

_NOT_YET = {
    "train_batch": "belongs to the pipeline engine, which is not built: call engine, backward and step",
    "eval_batch": "belongs to the pipeline engine, which is not built: call the engine under torch.no_grad()",
}


class Getters:
    """Read-only names of the engine; see DeepSpeed's documentation of each."""

    config: Config
    policy: Policy
    mesh: Mesh
    sharded: ShardedModel
    away: Away
    lr_scheduler: Any
    last_step: StepReport | None
    _accumulation: int
    _applied: bool
    _micro_batch: Any

    @property
    def optimizer(self) -> ZeroOptimizer | ParameterOffload | None:
        """What steps; without one, and where parameters are sharded, their hooks, as in DeepSpeed; or None."""
        return self.sharded.stepper or self.sharded.parameter_offload

    def _not_here(self, name: str) -> str:
        if name in _NOT_YET:
            return f"Engine has no {name!r} yet: {_NOT_YET[name]}"
        return f"neither the engine nor its module has an attribute {name!r}"

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self._micro_batch * self._accumulation * self.mesh.world

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward on one rank."""
        return self._micro_batch

    def gradient_accumulation_steps(self) -> int:
        """Micro-steps per optimizer step."""
        return self._accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train batch size, micro batch size, accumulation steps)."""
        return self.train_batch_size(), self._micro_batch, self._accumulation

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """What the caller feeds per forward; changes what ``train_batch_size`` says."""
        self._micro_batch = micro_batch_size

    def get_global_grad_norm(self) -> float | None:
        """Norm of the averaged, unscaled gradient of the last step, before clipping; None before the first."""
        return self.last_step.grad_norm if self.last_step else None

    def was_step_applied(self) -> bool:
        """Whether the last call of ``step`` updated the parameters: it was a boundary, and did not overflow."""
        return self._applied

    def get_lr(self) -> list[float]:
        """Learning rate of every parameter group now."""
        return [group["lr"] for group in self.sharded.stepper.param_groups] if self.sharded.stepper else []

    def get_mom(self) -> list[Any]:
        """Momentum, or betas, of every parameter group."""
        groups = self.sharded.stepper.param_groups if self.sharded.stepper else []
        return [group.get("betas", group.get("momentum")) for group in groups]

    def get_type(self) -> list[str]:
        """Name of the optimizer, once per parameter group."""
        stepper = self.sharded.stepper
        return [type(stepper.inner).__name__] * len(stepper.param_groups) if stepper else []

    def loss_scale(self) -> float:
        """What losses are multiplied with before they are differentiated; 1 unless fp16."""
        return self.sharded.stepper.loss_scale if self.sharded.stepper else 1.0

    @property
    def cur_scale(self) -> float:
        """The loss scale, by its older name."""
        return self.loss_scale()

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts."""
        return bool(self.sharded.stepper and self.sharded.stepper.scaler.dynamic)

    def gradient_clipping(self) -> float:
        """Bound on the global gradient norm; 0 is off."""
        return self.config.gradient_clipping

    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.sharded.stage.shards_optimizer

    def zero_optimization_stage(self) -> int:
        """0 to 3."""
        return self.sharded.stage.number

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded."""
        return self.sharded.stage.shards_gradients

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded."""
        return self.sharded.stage.shards_parameters

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """The config's word on gathering weights for saving."""
        return bool(self.config.zero_optimization.gather_16bit_weights_on_model_save)

    def fp16_enabled(self) -> bool:
        """Whether the model runs in fp16."""
        return bool(self.config.fp16.enabled)

    def bfloat16_enabled(self) -> bool:
        """Whether the model runs in bf16."""
        return bool(self.config.bf16.enabled)

    def torch_autocast_enabled(self) -> bool:
        """Whether forward runs under torch.autocast."""
        return self.policy.autocast is not None

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """(dtype of the model, dtype in which gradients are summed over micro-steps)."""
        return self.policy.param, self.policy.accumulate

    def optimizer_name(self) -> str | None:
        """The optimizer's class."""
        return type(self.sharded.stepper.inner).__name__ if self.sharded.stepper else None

    def scheduler_name(self) -> str | None:
        """The schedule's class."""
        return type(self.lr_scheduler).__name__ if self.lr_scheduler is not None else None

    def steps_per_print(self) -> float | None:
        """Optimizer steps between two log lines."""
        return self.config.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        """Whether times wait for the device."""
        return self.config.wall_clock_breakdown

    def memory(self) -> dict[str, int]:
        """Bytes of model state this rank holds now: parameters, gradients, optimizer, communication."""
        return dict(self.sharded.ledger.bytes_of)

    def achieved(self, machine: Machine | None = None, ranks_per_node: int = 1) -> list[Achieved]:
        """What each link that offload uses reached in the last step, beside what it can; a row prints as a line.

        Args:
            machine: its speeds; None measures this one: ten seconds, and 256 MiB in the folder that is offloaded to.
            ranks_per_node: how many share a node's links.

        Raises:
            ValueError: no step was made yet.
        """
        if self.last_step is None:
            raise ValueError("achieved() tells of the last step, and none was made yet: call step() first")
        if machine is None:
            offload = self.sharded.homes.offload
            machine = calibrate(offload.path or offload.parameters_path, mesh=self.mesh)
        return achieved(self.last_step, machine, ranks_per_node)

    def offload_states(
        self, include: Any = None, device: Any = "cpu", pin_memory: bool = True, non_blocking: bool = False
    ) -> None:
        """Free the device between phases; see ``zero.Away.offload``. Until ``reload_states`` nothing trains."""
        self.away.offload(include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what ``offload_states`` has put away."""
        self.away.reload(non_blocking)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.mesh.device

    @property
    def global_rank(self) -> int:
        """This rank."""
        return self.mesh.rank

    @property
    def local_rank(self) -> int:
        """This rank's number on its host, as the launcher says."""
        return comm.local_rank()

    @property
    def world_size(self) -> int:
        """Ranks that share the model."""
        return self.mesh.world

    dp_world_size = world_size

    def get_data_parallel_rank(self) -> int:
        """This rank, among those that share the model."""
        return self.mesh.rank

    def get_full_grad(self, p: torch.nn.Parameter) -> Tensor | None:
        """The averaged, unscaled gradient of ``p`` since the last step, whole. Collective."""
        from tritonspeed.zero import safe_get_full_grad

        return safe_get_full_grad(p)


# Methods that answer with a value of the config: their names, and its paths
_ZERO_KEYS = (
    *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "prefetch_bucket_size"),
    *("max_live_parameters", "max_reuse_distance", "param_persistence_threshold", "model_persistence_threshold"),
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions", "round_robin_gradients"),
    *("ignore_unused_parameters", "load_from_fp32_weights", "elastic_checkpoint", "offload_optimizer", "offload_param"),
)
_FLOPS_KEYS = (
    *("enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
    "recompute_fwd_factor",
)
_FROM_CONFIG = {
    **{f"zero_{key}": f"zero_optimization.{key}" for key in _ZERO_KEYS},
    **{key: key for key in ("managed_gradient_accumulation", "dataloader_drop_last")},
    **{key: key for key in ("gradient_predivide_factor", "dump_state", "memory_breakdown")},
    **{key: key for key in ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")},
    **{f"flops_profiler_{key}": f"flops_profiler.{key}" for key in _FLOPS_KEYS},
    "fp16_auto_cast": "fp16.auto_cast",
    "optimizer_params": "optimizer.params",
    "scheduler_params": "scheduler.params",
}


def _reader(name: str, path: str) -> Any:
    def read(self: Getters) -> Any:
        return value_at(self.config, path)

    read.__name__, read.__qualname__ = name, f"Getters.{name}"
    read.__doc__ = f"The config's ``{path}``."
    return read


for _name, _path in _FROM_CONFIG.items():
    setattr(Getters, _name, _reader(_name, _path))
