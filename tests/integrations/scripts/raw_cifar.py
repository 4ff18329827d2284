"""The shape of DeepSpeed's CIFAR tutorial: its arguments and data loader, optimizer and schedule from the config."""

from __future__ import annotations

import argparse
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import log_dist
from tiny import record
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset


def add_argument() -> Any:
    parser = argparse.ArgumentParser(description="CIFAR")
    parser.add_argument("-e", "--epochs", default=2, type=int, help="number of total epochs")
    parser.add_argument("--local_rank", type=int, default=-1, help="local rank passed from distributed launcher")
    parser.add_argument("--log-interval", type=int, default=2, help="output logging information at a given interval")
    parser.add_argument("--out", required=True)
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        return self.fc3(x)


def pictures(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.rand(count, 3, 32, 32, generator=generator) - 0.5, torch.randint(0, 10, (count,), generator=generator)
    )


deepspeed.init_distributed()
args = add_argument()
torch.manual_seed(0)
get_accelerator().set_device(max(args.local_rank, 0)) if get_accelerator().device_name() != "cpu" else None
net = Net()
parameters = filter(lambda p: p.requires_grad, net.parameters())
model_engine, optimizer, trainloader, scheduler = deepspeed.initialize(
    args=args, model=net, model_parameters=parameters, training_data=pictures(48, 1)
)
local_device = get_accelerator().device_name(model_engine.local_rank)
target_dtype = None
if model_engine.bfloat16_enabled():
    target_dtype = torch.bfloat16
elif model_engine.fp16_enabled():
    target_dtype = torch.half
criterion = nn.CrossEntropyLoss()

steps: list[dict[str, float]] = []
for epoch in range(args.epochs):
    running_loss = 0.0
    for i, data in enumerate(trainloader):
        inputs, labels = data[0].to(local_device), data[1].to(local_device)
        if target_dtype is not None:
            inputs = inputs.to(target_dtype)
        loss = criterion(model_engine(inputs).float(), labels)
        model_engine.backward(loss)
        model_engine.step()
        running_loss += loss.item()
        if model_engine.was_step_applied():
            norm = model_engine.get_global_grad_norm()
            step = {"loss": loss.item(), "learning_rate": scheduler.get_last_lr()[0]}
            steps.append(step if norm is None else {**step, "grad_norm": float(norm)})
        if i % args.log_interval == args.log_interval - 1:
            log_dist(f"[{epoch + 1}, {i + 1:5d}] loss: {running_loss / args.log_interval:.3f}", ranks=[0])
            running_loss = 0.0

with torch.no_grad():
    inputs, labels = pictures(16, 2)[:]
    outputs = model_engine(inputs.to(target_dtype) if target_dtype else inputs)
    accuracy = (outputs.argmax(1) == labels).float().mean().item()
    loss = criterion(outputs.float(), labels).item()
if deepspeed.comm.get_rank() == 0:
    sizes = {"train_batch_size": model_engine.train_batch_size(), "global_steps": model_engine.global_steps}
    record(args.out, steps, accuracy=accuracy, eval_loss=loss, batches=len(trainloader), **sizes)
