"""LAMB over one flat chunk of a block's tensors: moments and norms, then the step."""

import torch

from tritonspeed.kernels.intervals import Intervals
from tritonspeed.kernels.lamb import (
    LambStep,
    lamb_direction_reference,
    lamb_moments_,
    lamb_moments_reference,
    lamb_step_,
    trust_ratio_reference,
)
from tritonspeed.tuning.case import Case, Draw, Inputs
from tritonspeed.tuning.shapes import ModelShapes

STEP = LambStep(10, 1e-3, 0.9, 0.999, 1e-6, 0.01)


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """One block's parameters as four tensors, and one small one."""
    block, square = model.num_block_params // 64 * 64, model.hidden * model.hidden // 64 * 64
    return [_case([block // 4] * 4, dtype), _case([square], dtype)]


def _case(numels: list[int], dtype: torch.dtype) -> Case:
    n, has_copy = sum(numels), dtype != torch.float32
    intervals = [(sum(numels[:i]), sum(numels[: i + 1])) for i in range(len(numels))]

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        return {
            "master": draw.normal((n,), torch.float32, 0.02),
            "exp_avg": draw.normal((n,), torch.float32, 1e-3),
            "exp_avg_sq": draw.uniform((n,), torch.float32, 0.0, 1e-6),
            "grad": draw.normal((n,), dtype, 1e-3),
            "param_out": draw.zeros((n,), dtype) if has_copy else None,
            "intervals": Intervals.of(intervals, device),
        }

    def outputs(inputs: Inputs) -> list[torch.Tensor]:
        written = [inputs[name] for name in ("master", "exp_avg", "exp_avg_sq", "param_out")]
        return [x for x in written if x is not None]

    def run(inputs: Inputs) -> list[torch.Tensor]:
        p, m, v = (inputs[name] for name in ("master", "exp_avg", "exp_avg_sq"))
        norms = lamb_moments_(p, m, v, inputs["grad"], inputs["intervals"], STEP)
        lamb_step_(p, m, v, norms, inputs["intervals"], STEP, inputs["param_out"])
        return outputs(inputs)

    def reference(inputs: Inputs) -> list[torch.Tensor]:
        for start, end in intervals:
            p, m, v, g = (inputs[name][start:end] for name in ("master", "exp_avg", "exp_avg_sq", "grad"))
            ratio = trust_ratio_reference(lamb_moments_reference(p, m, v, g, STEP), STEP).to(p.dtype)
            p.sub_(STEP.step_size * ratio * lamb_direction_reference(p, m, v, STEP))
        if inputs["param_out"] is not None:
            inputs["param_out"].copy_(inputs["master"])
        return outputs(inputs)

    return Case(
        "lamb_", "forward", {"n": n, "tensors": len(numels)}, dtype,
        num_bytes=n * (36 + dtype.itemsize * (1 + has_copy)), num_flops=24 * n,
        make=make, run=run, reference=reference, num_summed=max(numels),
    )  # fmt: skip
