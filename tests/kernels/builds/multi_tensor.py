"""AdamW over a table of addresses: every set of types; sizes are in the table, so that no shape reaches other code."""

import torch

from builds import Build
from tritonspeed.kernels.multi_tensor import MultiTensorAdamW, TensorColumns


def call(
    grad: torch.dtype, out: torch.dtype | None, decoupled: bool = True, random: bool = False,
    state: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    sizes = (65536, 50257, 3)
    masters = [torch.empty(n) for n in sizes]
    exp_avgs, exp_avg_sqs = ([torch.empty(n, dtype=state) for n in sizes] for _ in range(2))
    outs = None if out is None else [torch.empty(n, dtype=out) for n in sizes]
    columns = TensorColumns(masters, exp_avgs, exp_avg_sqs, outs, rows=[0, 1, 0], places=[0, 1, 2])
    MultiTensorAdamW(columns, grad, decoupled, random).update_(torch.ones(()), torch.zeros(()))


BUILDS = {
    "fp32": Build(lambda: call(torch.float32, None)),
    "bf16": Build(lambda: call(torch.bfloat16, torch.bfloat16)),
    "bf16, stochastic": Build(lambda: call(torch.bfloat16, torch.bfloat16, random=True)),
    "bf16, bf16 moments": Build(lambda: call(torch.bfloat16, torch.bfloat16, random=True, state=torch.bfloat16)),
    "fp16, Adam": Build(lambda: call(torch.float16, torch.float16, decoupled=False)),
}
