"""Whole weights out of the engine and into it, under DeepSpeed's names. Every call is collective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tritonspeed.checkpoint.agree import together
from tritonspeed.checkpoint.weights_file import write_tensors

if TYPE_CHECKING:
    from tritonspeed.comm import Mesh
    from tritonspeed.config import Config
    from tritonspeed.zero import Away, ShardedModel

log = logging.getLogger("tritonspeed")


class Weights:
    """The part of the engine that gathers a model for others' files."""

    module: nn.Module
    config: Config
    mesh: Mesh
    sharded: ShardedModel
    away: Away

    def module_state_dict(
        self, exclude_frozen_parameters: bool = False, rank0_only: bool = False, **ignored: Any
    ) -> dict[str, Tensor]:
        """Whole parameters and buffers on the CPU, in the dtype that modules compute with; one unit at a time is
        gathered. Collective.

        Args:
            exclude_frozen_parameters: leave out what is not trained.
            rank0_only: other ranks return an empty dictionary.
        """
        whole = self.sharded.full_state_dict(rank0_only)
        if not exclude_frozen_parameters:
            return whole
        frozen = {n for n, p in self.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return {name: tensor for name, tensor in whole.items() if name not in frozen}

    def save_16bit_model(
        self, save_dir: Any, save_filename: str = "pytorch_model.bin", exclude_frozen_parameters: bool = False
    ) -> bool:
        """Write the whole model's weights, in the dtype that modules compute with, into one file. Collective.

        Args:
            save_dir: made where it is missing.
            save_filename: one that ends in ``.safetensors`` is written so, any other with ``torch.save``.
            exclude_frozen_parameters: leave out what is not trained.

        Returns:
            False, and nothing is written, at stage 3 without ``stage3_gather_16bit_weights_on_model_save``.
        """
        path = Path(save_dir) / save_filename
        gathers = self.config.zero_optimization.gather_16bit_weights_on_model_save
        if self.sharded.stage.shards_parameters and not gathers:
            log.warning(
                "%s was not written: zero_optimization.stage3_gather_16bit_weights_on_model_save is false. Set it to "
                "true, or take model/ of a checkpoint (checkpoint.save_model), which gathers nothing",
                path,
            )
            return False
        whole = self.module_state_dict(exclude_frozen_parameters, rank0_only=True)

        def write() -> None:
            if self.mesh.rank == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, whole)

        together(self.mesh, write)
        return True

    save_fp16_model = save_16bit_model

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """The whole model on rank 0, None elsewhere. Collective."""
        if not self.sharded.stage.shards_parameters:
            raise ValueError(
                f"_zero3_consolidated_16bit_state_dict() at ZeRO stage {self.sharded.stage.number}: parameters are "
                "whole on every rank; take module_state_dict()"
            )
        return self._consolidated_16bit_state_dict(exclude_frozen_parameters)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """The same at any stage."""
        whole = self.module_state_dict(exclude_frozen_parameters, rank0_only=True)
        return whole if self.mesh.rank == 0 else None

    def load_module_state_dict(
        self,
        checkpoint: Mapping[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., Any] | None = None,
        fetch_z3_params: bool = False,
    ) -> None:
        """Set the model's weights from a whole state dict, which every rank has. Collective.

        Args:
            checkpoint: a state dict, or a dictionary that has one under "module".
            strict: names must match, as in ``load_state_dict``.
            custom_load_fn: called with ``src=`` the state dict and ``dst=`` the module instead.
            fetch_z3_params: nothing to switch: parameters are gathered where they are sharded.
        """
        from tritonspeed.zero import GatheredParameters

        self.away.require_here("load_module_state_dict()")
        values = checkpoint.get("module", checkpoint)
        with torch.no_grad(), GatheredParameters(list(self.module.parameters()), modifier_rank=0):
            if custom_load_fn is not None:
                custom_load_fn(src=values, dst=self.module)
            else:
                self.module.load_state_dict(values, strict=strict)
