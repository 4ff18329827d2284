"""Blocks that choose floating types: fp16, bf16, autocast, accumulation."""

from dataclasses import dataclass
from typing import Any

from tritonspeed.config.keys import Dtype, key, unless

MASTERS_STAY = "masters are fp32; set it to false (moments can be kept in fewer bits: optimizer.params.state)"
MOMENTS_ELSEWHERE = 'set it to false, and optimizer.params.state to "bf16" for Adam and AdamW; masters stay fp32'


def _fp16_on(config: Any) -> str | None:
    """acts with fp16.enabled"""
    return None if config.fp16.enabled is True else "acts only with fp16.enabled"


def _dynamic_scale(config: Any) -> str | None:
    """acts with fp16.enabled and a dynamic loss scale"""
    if config.fp16.loss_scale not in (0, "auto"):
        return f"the loss scale is fixed at {config.fp16.loss_scale:g}; 0 makes it dynamic"
    return _fp16_on(config)


def _bf16_on(config: Any) -> str | None:
    """acts with bf16.enabled"""
    return None if config.bf16.enabled is True else "acts only with bf16.enabled"


def _autocast_on(config: Any) -> str | None:
    """acts with torch_autocast.enabled"""
    return None if config.torch_autocast.enabled is True else "acts only with torch_autocast.enabled"


@dataclass(frozen=True)
class Fp16:
    """Half precision with loss scaling. The masters stay fp32."""

    enabled: bool = key(
        False, "compute in fp16 with loss scaling", auto="true iff the model is float16 and bf16 is not on"
    )
    auto_cast: bool = key(False, "cast floating inputs of the model to fp16", inert=_fp16_on)
    loss_scale: float = key(0, "fixed loss scale; 0 makes it dynamic", inert=_fp16_on, low=0)
    initial_scale_power: int = key(16, "the scale starts at 2 to this power", inert=_dynamic_scale, low=0)
    loss_scale_window: int = key(
        1000, "clean steps before the scale doubles", unit="steps", inert=_dynamic_scale, low=1
    )
    hysteresis: int = key(2, "overflows tolerated before the scale halves", inert=_dynamic_scale, low=1)
    consecutive_hysteresis: bool = key(False, "a clean step refills the hysteresis", inert=_dynamic_scale)
    min_loss_scale: float = key(1, "the scale never falls below this", inert=_dynamic_scale, low=0)
    fp16_master_weights_and_grads: bool = key(False, "masters in fp16", refuse=unless(False, use=MASTERS_STAY))
    fused_mode: bool = key(True, "choice of optimizer class", inert="an elementwise optimizer is always one launch")


@dataclass(frozen=True)
class Bf16:
    """bfloat16 compute. The masters stay fp32."""

    enabled: bool = key(False, "compute in bf16", auto="true iff the model is bfloat16 and fp16 is not on")
    check_grad_overflow: bool = key(True, "skip and report a step with a non-finite gradient", inert=_bf16_on)
    immediate_grad_update: bool = key(
        False, "when gradients reach the fp32 buffer", inert="they are accumulated as soon as they are reduced"
    )
    bf16_master_weights_and_grads: bool = key(False, "masters in bf16", refuse=unless(False, use=MASTERS_STAY))
    bf16_optimizer_states: bool = key(False, "moments in bf16", refuse=unless(False, use=MOMENTS_ELSEWHERE))


@dataclass(frozen=True)
class TorchAutocast:
    """fp32 parameters under torch.autocast."""

    enabled: bool = key(False, "run forward under torch.autocast")
    dtype: Dtype | None = key(None, "autocast's type; null means bf16", inert=_autocast_on)
    lower_precision_safe_modules: list[str] | None = key(
        None, "classes whose parameters and gradients may be exchanged in that type", inert=_autocast_on
    )


@dataclass(frozen=True)
class DataTypes:
    """Types that are not implied by fp16 and bf16."""

    grad_accum_dtype: Dtype | None = key(None, "type in which micro-batches' gradients are added; null means fp32")
    param_dtype: Dtype | None = key(
        None, "type of the parameters", refuse=unless(use="use fp16, bf16 or torch_autocast, or convert the model")
    )
    buffer_dtype: Dtype | None = key(
        None, "type of the buffers", refuse=unless(use="convert the model's buffers before initialize")
    )
    keep_in_fp32_modules: list[str] = key([], "buffers that stay fp32", inert="buffers keep the type that they have")
