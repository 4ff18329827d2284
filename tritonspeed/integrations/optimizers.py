"""DeepSpeed's optimizer classes with its arguments and defaults, over ours: which chunk stands where decides the rest.

Names that say CPU and names that say Fused are one thing here: offloaded state is updated on the host.
"""

from __future__ import annotations

from typing import Any

from tritonspeed.optim import Adagrad, AdamW, Lamb, Lion


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


class FusedLion(Lion):
    """``deepspeed.ops.lion.FusedLion``; its defaults are not the paper's, as those of ``tritonspeed.optim.Lion`` are.

    Args:
        params: parameters or groups.
        lr, betas, weight_decay: as in Lion.
        set_grad_none: accepted: gradients are always freed.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay)


class DeepSpeedCPULion(FusedLion):
    """``deepspeed.ops.lion.DeepSpeedCPULion``: the same Lion.

    Args:
        model_params: parameters or groups.
        fp32_optimizer_states: accepted: states are fp32 unless the config says otherwise.
        adamw_mode: accepted: Accelerate gives it to whatever it puts in place of a script's optimizer.
        others: as in FusedLion.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0,
        fp32_optimizer_states: bool = True,
        adamw_mode: bool = False,
    ) -> None:
        super().__init__(model_params, lr, betas, weight_decay)


class DeepSpeedCPUAdagrad(Adagrad):
    """``deepspeed.ops.adagrad.DeepSpeedCPUAdagrad``: Adagrad.

    Args:
        model_params: parameters or groups.
        lr, eps, weight_decay: as in Adagrad.
        amsgrad, fp32_optimizer_states, adamw_mode: accepted, and without effect, as in DeepSpeed.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        adamw_mode: bool = False,
    ) -> None:
        super().__init__(model_params, lr=lr, eps=eps, weight_decay=weight_decay)


class FusedLamb(Lamb):
    """``deepspeed.ops.lamb.FusedLamb``: LAMB.

    Args:
        params: parameters or groups.
        max_grad_norm: refused where it is set.
        amsgrad: refused when true, as DeepSpeed does.
        others: as in Lamb.

    Raises:
        ValueError: one of those two is asked for.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        if amsgrad:
            raise ValueError("FusedLamb does not do amsgrad, neither here nor in DeepSpeed: leave it out")
        if max_grad_norm > 0:
            raise ValueError(
                f'FusedLamb\'s max_grad_norm={max_grad_norm} is not provided: "gradient_clipping": {max_grad_norm} in'
                " the config clips by the norm over all ranks"
            )
        super().__init__(
            params,
            lr=lr,
            bias_correction=bias_correction,
            betas=tuple(betas),
            eps=eps,
            eps_inside_sqrt=eps_inside_sqrt,
            weight_decay=weight_decay,
            max_coeff=max_coeff,
            min_coeff=min_coeff,
        )
