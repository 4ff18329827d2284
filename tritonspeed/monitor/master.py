"""The monitor of an engine, under DeepSpeed's name for it: what of a step is written, and under which names.

    Train/Samples/lr                    of the next step, as DeepSpeed writes it
    Train/Samples/loss_scale            likewise; with fp16
    Train/Samples/train_loss            rank 0's mean over the step's micro-steps
    Train/Samples/elapsed_time_ms_...   forward, backward, backward_inner, backward_allreduce, step; with
                                        wall_clock_breakdown or flops_profiler

Each over the samples that all ranks have seen, the step's included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from tritonspeed import comm
from tritonspeed.config import Config, load
from tritonspeed.monitor.files import CsvWriter, JsonlWriter, TensorboardWriter
from tritonspeed.monitor.outbox import Entry, Event, Outbox, Writer
from tritonspeed.monitor.services import CometWriter, RunWriter

FILES = ("tensorboard", "csv_monitor", "jsonl_monitor")
SERVICES = ("wandb", "comet", "trackio")
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml", "trackio": "trackio"}
_TO_INSTALL = {"comet": '"comet_ml>=3.41.0"'}
_PREFIX = "Train/Samples/"


class MonitorMaster:
    """Writes figures to all that a config enables, on rank 0; on other ranks it answers, and writes nothing.

    Args:
        monitor_config: a config, or whatever has its monitor blocks as attributes.
        rank: this rank; None asks torch.distributed.

    Raises:
        ValueError: a library is missing, or a folder cannot be made.
    """

    def __init__(self, monitor_config: Any, rank: int | None = None) -> None:
        blocks = {name: getattr(monitor_config, name, None) for name in (*FILES, *SERVICES)}
        blocks = {name: block for name, block in blocks.items() if block is not None and block.enabled}
        self.monitor_config = monitor_config
        self.enabled = bool(blocks)
        for name in blocks:
            _require(name)
        rank = comm.mesh_of().rank if rank is None and comm.is_initialized() else rank or 0
        writers = {name: _open(name, block) for name, block in blocks.items()} if rank == 0 else {}
        self.tb_monitor, self.csv_monitor = writers.get("tensorboard"), writers.get("csv_monitor")
        self.wandb_monitor, self.comet_monitor = writers.get("wandb"), writers.get("comet")
        self._outbox = Outbox(list(writers.values())) if writers else None

    def write_events(self, event_list: Iterable[tuple[str, Any, int]]) -> None:
        """Write figures of one's own; returns at once.

        Args:
            event_list: (name, value, samples): a number, or a tensor of one element.
        """
        if self._outbox is not None:
            self._outbox.put(Entry([Event(name, _number(value), int(at)) for name, value, at in event_list]))

    def write_step(
        self,
        report: Any,
        samples: int,
        lr: float | None,
        loss_scale: float | None = None,
        reduce_ms: float | None = None,
    ) -> None:
        """Write a step's figures; returns at once.

        Args:
            report: the ``StepReport``.
            samples: that all ranks have seen.
            lr: the learning rate now.
            loss_scale: the loss scale now; None without fp16.
            reduce_ms: of the backward, what was waited for gradients on their way; None leaves all times out.
        """
        if self._outbox is None:
            return
        figures = {"lr": lr, "loss_scale": loss_scale, "train_loss": report.loss}
        if reduce_ms is not None:
            times = {"forward": report.forward_ms, "backward": report.backward_ms, "step": report.step_ms}
            times |= {"backward_inner": report.backward_ms - reduce_ms, "backward_allreduce": reduce_ms}
            figures |= {f"elapsed_time_ms_{name}": value for name, value in times.items()}
        events = [Event(_PREFIX + name, value, samples) for name, value in figures.items() if value is not None]
        self._outbox.put(Entry(events, {"time": time.time(), "samples": samples, **asdict(report)}))

    def flush(self, timeout_s: float = 0.0) -> bool:
        """Write what waits now, and wait for it up to ``timeout_s``; whether all is written."""
        return self._outbox is None or self._outbox.flush(timeout_s)

    def close(self) -> None:
        """Write what waits, and end the files."""
        if self._outbox is not None:
            self._outbox.close()


def get_monitor_config(param_dict: Mapping[str, Any]) -> Config:
    """The monitor blocks of a ds_config.json's dict, for ``MonitorMaster``; the rest of it is not looked at."""
    blocks = {name: param_dict[name] for name in (*FILES, *SERVICES) if name in param_dict}
    return load({"train_micro_batch_size_per_gpu": 1, **blocks})


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _require(name: str) -> None:
    """The same on every rank, so that none waits for one that has failed."""
    package = _PACKAGES.get(name)
    if package is None or package in sys.modules:
        return
    found = find_spec(package)
    if found is None or found.origin is None:  # a folder of that name, as wandb leaves one where a script runs
        wanted = _TO_INSTALL.get(name, package)
        raise ValueError(
            f'the config enables "{name}", and the package {package} is not installed: pip install {wanted}, or set'
            f" {name}.enabled to false"
        )


def _open(name: str, block: Any) -> Writer:
    try:
        match name:
            case "tensorboard":
                return TensorboardWriter(block)
            case "csv_monitor":
                return CsvWriter(block)
            case "jsonl_monitor":
                return JsonlWriter(block)
            case "comet":
                return CometWriter(block)
            case _:
                return RunWriter(block, name)
    except OSError as error:
        folder = f"{block.output_path or '.'}/{block.job_name}" if name in FILES else "its files"
        raise ValueError(f"{name}: {folder} cannot be written ({error}): choose another {name}.output_path") from error
