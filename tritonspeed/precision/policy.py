"""The dtype policy: one frozen row that says in which type every tensor of a run is stored, computed and sent.

    field        fp32    bf16    fp16    autocast(bf16)    what has this dtype
    param        fp32    bf16    fp16    fp32              the model's parameters, and what an all-gather moves
    compute      fp32    bf16    fp16    bf16              the matrix products of forward and backward
    reduce       fp32    bf16    fp16    fp32              gradients on the wire; sums are taken in fp32 whatever it is
    accumulate   fp32    fp32    fp32    fp32              the gradient sum over the micro-steps of one step
    master       fp32    fp32    fp32    fp32              the weights that the optimizer updates
    state        fp32    fp32    fp32    fp32              the optimizer's moments
    autocast     none    none    none    bf16              the dtype of `torch.autocast` around forward, or none

This is the only place that names a default dtype. `communication_data_type` changes `reduce`;
`data_types.grad_accum_dtype` changes `accumulate`, whose default is fp32 here, where DeepSpeed sums micro-steps in the
model's own dtype: two bytes more per gradient element, for sums that do not lose their small terms.

Under autocast the parameters stay fp32, so their gradients are fp32 and are sent as fp32 unless
`communication_data_type` says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tritonspeed.config import Config

_SPELLINGS = {
    torch.float32: ("fp32", "float32", "float"),
    torch.bfloat16: ("bf16", "bfloat16"),
    torch.float16: ("fp16", "float16", "half"),
}
_DTYPES = {spelling: dtype for dtype, spellings in _SPELLINGS.items() for spelling in spellings}


def parse_dtype(value: str | torch.dtype, key: str) -> torch.dtype:
    """The floating dtype that a config value names.

    Args:
        value: "fp32", "bfloat16", "torch.half", ... in any case, or a torch dtype.
        key: the config key, repeated in the error.

    Raises:
        ValueError: for anything but fp32, bf16 and fp16.
    """
    dtype = value if isinstance(value, torch.dtype) else _DTYPES.get(str(value).lower().removeprefix("torch."))
    if dtype not in _SPELLINGS:
        raise ValueError(f'{key} is {value!r}, which is no dtype to train in: use "fp32", "bf16" or "fp16"')
    return dtype


def _short(dtype: torch.dtype) -> str:
    return _SPELLINGS[dtype][0]


@dataclass(frozen=True, slots=True)
class Policy:
    """The dtype of each kind of tensor; the module's docstring has the table.

    Attributes:
        param, compute, reduce, accumulate, master, state: see the table.
        autocast: dtype of `torch.autocast` around forward; None when the module runs in `compute` as it is.
    """

    param: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype
    accumulate: torch.dtype
    master: torch.dtype
    state: torch.dtype
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.accumulate not in (torch.float32, self.param):
            raise ValueError(
                f"data_types.grad_accum_dtype {_short(self.accumulate)} goes with neither the model's "
                f'{_short(self.param)} nor fp32: set "fp32", "{_short(self.param)}", or leave it out'
            )

    @classmethod
    def of(cls, precision: str | torch.dtype) -> Policy:
        """The policy of a model that is stored and computed in one dtype, with fp32 masters, moments and sums.

        Args:
            precision: "fp32", "bf16", "fp16" or their dtypes.
        """
        model = parse_dtype(precision, "precision")
        return cls(model, model, reduce=model, accumulate=torch.float32, master=torch.float32, state=torch.float32)

    @classmethod
    def with_autocast(cls, precision: str | torch.dtype) -> Policy:
        """The policy of an fp32 model whose forward runs under `torch.autocast` in `precision`."""
        dtype = parse_dtype(precision, "torch_autocast.dtype")
        if dtype == torch.float32:
            raise ValueError('torch_autocast.dtype is fp32, which casts nothing: set "bf16" or "fp16", or disable it')
        return replace(cls.of(torch.float32), compute=dtype, autocast=dtype)

    @classmethod
    def from_config(cls, config: Config) -> Policy:
        """The policy that a resolved config asks for.

        Read are the blocks `fp16`, `bf16`, `torch_autocast` and `data_types`, and `communication_data_type`.
        Autocast without a dtype is bf16: it needs no loss scale.

        Raises:
            ValueError: two precisions are enabled at once, or `grad_accum_dtype` is neither fp32 nor the model's.
        """
        precision, uses_autocast = _enabled_precision(config)
        if uses_autocast:
            policy = cls.with_autocast(config.torch_autocast.dtype or torch.bfloat16)
        else:
            policy = cls.of(precision)
        if config.communication_data_type is not None:
            policy = replace(policy, reduce=parse_dtype(config.communication_data_type, "communication_data_type"))
        accumulate = config.data_types.grad_accum_dtype
        if accumulate is not None:
            policy = replace(policy, accumulate=parse_dtype(accumulate, "data_types.grad_accum_dtype"))
        return policy

    @property
    def needs_loss_scale(self) -> bool:
        """Whether gradients pass through fp16, whose smallest number is 2⁻²⁴ and whose largest is 65,504."""
        return self.compute == torch.float16


def _enabled_precision(config: Config) -> tuple[str, bool]:
    """("fp32" | "bf16" | "fp16", whether torch_autocast is enabled), after refusing combinations."""
    enabled = []
    for name in ("fp16", "bf16", "torch_autocast"):
        value = getattr(config, name).enabled
        if not isinstance(value, bool):
            raise ValueError(f"{name}.enabled is {value!r}, not yet true or false: call config.resolve(...) first")
        if value:
            enabled.append(name)
    if "torch_autocast" in enabled and len(enabled) > 1:
        raise ValueError(
            f"torch_autocast.enabled and {enabled[0]}.enabled are both true, but autocast keeps parameters in fp32 and "
            f'{enabled[0]} stores them in 16 bits: to compute in {enabled[0]} set "torch_autocast": {{"enabled": true, '
            f'"dtype": "{enabled[0]}"}} alone, or {enabled[0]} alone'
        )
    if len(enabled) > 1:
        raise ValueError(
            "fp16.enabled and bf16.enabled are both true, and a model has one dtype: set bf16 alone on hardware that "
            "has it (no loss scale to tune), fp16 alone elsewhere"
        )
    precision = enabled[0] if enabled and enabled[0] != "torch_autocast" else "fp32"
    return precision, "torch_autocast" in enabled
