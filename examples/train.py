"""A small network learns a sine under the ZeRO stage of a ds_config.json, with DeepSpeed's own calls.

tritonspeed run --num_procs 2 examples/train.py --deepspeed_config examples/ds_config.json --checkpoints saved

Stop it whenever you like: the same line goes on from the last checkpoint, with as many ranks as it is given then.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import TensorDataset

import tritonspeed as ts

parser = ts.add_config_arguments(argparse.ArgumentParser())
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--checkpoints", default=None, help="a folder to save into and to go on from; none saves nothing")
parser.add_argument("--save_every", type=int, default=50)
args = parser.parse_args()

torch.manual_seed(0)
x = 6 * torch.rand(1600, 1) - 3
model = nn.Sequential(nn.Linear(1, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1))

engine, optimizer, loader, scheduler = ts.initialize(args=args, model=model, training_data=TensorDataset(x, x.sin()))
assert loader is not None, "training data were given"
dtype, _ = engine.get_data_types()
if args.checkpoints:
    engine.load_checkpoint(args.checkpoints)  # weights, optimizer, schedule, random states, the loader's position

while engine.global_steps < args.steps:
    for inputs, targets in loader:
        outputs = engine(inputs.to(engine.device, dtype))
        loss = nn.functional.mse_loss(outputs.float(), targets.to(engine.device))
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0 and engine.global_steps % 40 == 0:
            print(engine.last_step)
        if args.checkpoints and engine.was_step_applied() and engine.global_steps % args.save_every == 0:
            engine.save_checkpoint(args.checkpoints)
        if engine.global_steps >= args.steps:
            break

if engine.global_rank == 0:
    print(engine.explain())
ts.comm.shutdown()
