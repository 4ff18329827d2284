"""AdamW over a table of tensors: the matrices and norms of a block, each where it is."""

from collections.abc import Callable

import torch
from torch import Tensor

from tritonspeed.kernels._triton import card_of, takes_reference
from tritonspeed.kernels.adamw import AdamWStep, adamw_, adamw_reference
from tritonspeed.kernels.multi_tensor import MULTI_TENSOR_ADAMW, MultiTensorAdamW, TensorColumns, addresses_of
from tritonspeed.tuning.case import Case, Draw, Inputs
from tritonspeed.tuning.cases.adamw import HYPER
from tritonspeed.tuning.shapes import ModelShapes

STEP = AdamWStep(10, 1e-3, 0.9, 0.95, 1e-8, 0.1, decoupled=True, bias_correction=True, seed=None, first_element=0)


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """The nine tensors of a block."""
    queries, keys = model.hidden * model.heads * model.head_dim, model.hidden * model.kv_heads * model.head_dim
    numels = [queries, keys, keys, queries, *[model.hidden * model.ffn] * 3, model.hidden, model.hidden]
    return [_case(numels, dtype)]


def _case(numels: list[int], dtype: torch.dtype) -> Case:
    n, has_copy = sum(numels), dtype != torch.float32

    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        return {
            "masters": [draw.normal((k,), torch.float32, 0.02) for k in numels],
            "exp_avgs": [draw.normal((k,), torch.float32, 1e-3) for k in numels],
            "exp_avg_sqs": [draw.uniform((k,), torch.float32, 0.0, 1e-6) for k in numels],
            "grads": [draw.normal((k,), dtype, 1e-3) for k in numels],
            "outs": [draw.zeros((k,), dtype) for k in numels] if has_copy else None,
            "tables": {},  # launch → table: made once in a training run, so not timed
        }

    def outputs(inputs: Inputs) -> list[Tensor]:
        return [*inputs["masters"], *inputs["exp_avgs"], *inputs["exp_avg_sqs"], *(inputs["outs"] or ())]

    def table_of(inputs: Inputs) -> MultiTensorAdamW:
        how = MULTI_TENSOR_ADAMW.resolve(card_of(inputs["masters"][0]))
        if how not in inputs["tables"]:
            places = list(range(len(numels)))
            columns = TensorColumns(
                inputs["masters"], inputs["exp_avgs"], inputs["exp_avg_sqs"], inputs["outs"], [0] * len(numels), places
            )
            table = MultiTensorAdamW(columns, dtype, decoupled=True, stochastic_rounding=False)
            table.set_row(0, STEP)
            table.set_grads(addresses_of(inputs["grads"]))
            table.upload_()
            inputs["tables"][how] = table
        return inputs["tables"][how]

    def each(inputs: Inputs, step_: Callable[..., None]) -> list[Tensor]:
        columns = (inputs[name] for name in ("masters", "exp_avgs", "exp_avg_sqs", "grads"))
        for i, (p, m, v, g) in enumerate(zip(*columns, strict=True)):
            step_(p, m, v, g, param_out=inputs["outs"][i] if has_copy else None, **HYPER)
        return outputs(inputs)

    def run(inputs: Inputs) -> list[Tensor]:
        if takes_reference(inputs["masters"][0]):
            return each(inputs, adamw_)  # what the optimizer does with tensors on a CPU
        table_of(inputs).update_()
        return outputs(inputs)

    return Case(
        "multi_tensor_adamw_", "forward", {"tensors": len(numels), "n": n}, dtype,
        num_bytes=n * (24 + dtype.itemsize * (1 + has_copy)), num_flops=15 * n, make=make, run=run,
        reference=lambda inputs: each(inputs, adamw_reference),
    )  # fmt: skip
