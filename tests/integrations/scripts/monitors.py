"""A loop of DeepSpeed's own with every monitor that writes files: which files, tags, columns, steps and values."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import deepspeed
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

STEPS, ACCUMULATION = 4, 2
TRAIN_LOSS = "Train/Samples/train_loss"  # the documentation names it, and 0.19.8 writes it in its pipeline engine alone


def csv_files(folder: Path) -> dict[str, Any]:
    """Name of a file to its rows; of times only what does not change from run to run."""
    files = {}
    for path in sorted(set(folder.glob("*.csv")) - {folder / f"{TRAIN_LOSS.replace('/', '_')}.csv"}):
        rows = list(csv.reader(path.read_text().splitlines()))
        files[path.name] = [row[:1] for row in rows] if "elapsed_time" in path.name else rows
    return files


def tags(folder: Path) -> dict[str, Any]:
    """Tag to its steps, with the values where they do not change from run to run."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = sorted(set(events.Tags()["scalars"]) - {TRAIN_LOSS})
    return {
        tag: [[e.step] if "elapsed_time" in tag else [e.step, e.value] for e in events.Scalars(tag)] for tag in names
    }


def main() -> None:
    args = tiny.arguments().parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed)
    generator = torch.Generator().manual_seed(1 + engine.global_rank)
    for _ in range(STEPS * ACCUMULATION):
        x = torch.randn(2, 8, generator=generator).to(engine.device, torch.bfloat16)
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
    assert engine.monitor.enabled
    engine.monitor.write_events([("Own/accuracy", 0.5, engine.global_samples), ("plain name", 2, 7)])
    enabled, rank = engine.monitor.enabled, engine.global_rank
    engine.destroy()
    if rank == 0:
        tiny.record(args.out, [], enabled=enabled, csv=csv_files(Path("csv/run")), tags=tags(Path("events/run")))


if __name__ == "__main__":
    main()
