"""A small network learns a sine under the ZeRO stage of a ds_config.json, with DeepSpeed's own calls.

tritonspeed run --num_procs 2 examples/train.py --deepspeed_config examples/ds_config.json
"""

import argparse

import torch
from torch import nn
from torch.utils.data import TensorDataset

import tritonspeed as ts

parser = ts.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

torch.manual_seed(0)
x = 6 * torch.rand(8 * args.steps, 1) - 3
model = nn.Sequential(nn.Linear(1, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))

engine, optimizer, loader, scheduler = ts.initialize(args=args, model=model, training_data=TensorDataset(x, x.sin()))
assert loader is not None, "training data were given"
dtype, _ = engine.get_data_types()

while engine.global_steps < args.steps:
    for inputs, targets in loader:
        outputs = engine(inputs.to(engine.device, dtype))
        loss = nn.functional.mse_loss(outputs.float(), targets.to(engine.device))
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0 and engine.global_steps % 40 == 0:
            print(engine.last_step)
        if engine.global_steps >= args.steps:
            break

if engine.global_rank == 0:
    print(engine.explain())
ts.comm.shutdown()
