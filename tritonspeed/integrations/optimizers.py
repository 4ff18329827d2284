"""DeepSpeed's optimizer classes with its arguments, as factories of ours: which chunk stands where decides the rest."""

from __future__ import annotations

from typing import Any

from tritonspeed.optim import AdamW


class FusedAdam(AdamW):
    """``deepspeed.ops.adam.FusedAdam``: AdamW in one pass; ``adam_w_mode=False`` couples the weight decay.

    Args:
        params: parameters or groups.
        lr, bias_correction, betas, eps, weight_decay: as in AdamW.
        adam_w_mode: False is Adam with L2 regularisation.
        amsgrad: refused when true, as DeepSpeed does.
        set_grad_none: accepted: gradients are always freed.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if amsgrad:
            raise ValueError("FusedAdam does not do amsgrad, neither here nor in DeepSpeed: use torch.optim.AdamW")
        super().__init__(
            params,
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            decoupled=adam_w_mode,
        )


class DeepSpeedCPUAdam(FusedAdam):
    """``deepspeed.ops.adam.DeepSpeedCPUAdam``: the same AdamW; offloaded state is updated on the host.

    Args:
        model_params: parameters or groups.
        adamw_mode: False is Adam with L2 regularisation.
        fp32_optimizer_states: accepted: states are fp32 unless the config says otherwise.
        others: as in FusedAdam.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)
