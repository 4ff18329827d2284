"""Which dtype everything has (`policy`), and how fp16 gradients are kept in range (`loss_scale`)."""

from tritonspeed.precision.loss_scale import LossScaler, ScaleChange, ScaleEvent
from tritonspeed.precision.policy import Policy, parse_dtype

__all__ = ["LossScaler", "Policy", "ScaleChange", "ScaleEvent", "parse_dtype"]
