"""AdamW over one flat chunk, as large as a block of the model: fp32 states, gradient and copy in the model's type."""

import torch

from tritonspeed.kernels.adamw import adamw_, adamw_reference
from tritonspeed.tuning.case import Case, Draw, Inputs
from tritonspeed.tuning.shapes import ModelShapes

HYPER = {"step": 10, "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """One block's parameters, and a small chunk: an embedding's worth of norms."""
    return [_case(model.num_block_params, dtype), _case(model.hidden * model.hidden, dtype)]


def _case(n: int, dtype: torch.dtype) -> Case:
    has_copy = dtype != torch.float32

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        return {
            "master": draw.normal((n,), torch.float32, 0.02),
            "exp_avg": draw.normal((n,), torch.float32, 1e-3),
            "exp_avg_sq": draw.uniform((n,), torch.float32, 0.0, 1e-6),
            "grad": draw.normal((n,), dtype, 1e-3),
            "param_out": draw.zeros((n,), dtype) if has_copy else None,
        }

    def outputs(inputs: Inputs) -> list[torch.Tensor]:
        written = [inputs[name] for name in ("master", "exp_avg", "exp_avg_sq", "param_out")]
        return [x for x in written if x is not None]

    def run(inputs: Inputs) -> list[torch.Tensor]:
        adamw_(**inputs, **HYPER)
        return outputs(inputs)

    def reference(inputs: Inputs) -> list[torch.Tensor]:
        adamw_reference(**inputs, **HYPER)
        return outputs(inputs)

    return Case(
        "adamw_", "forward", {"n": n}, dtype, num_bytes=n * (24 + dtype.itemsize * (1 + has_copy)), num_flops=15 * n,
        make=make, run=run, reference=reference,
    )  # fmt: skip
