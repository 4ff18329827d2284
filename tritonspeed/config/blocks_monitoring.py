"""Blocks that watch a run. None of them changes a number of the training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tritonspeed.config.keys import block, key


def _where_enabled(name: str) -> Callable[[Any], str | None]:
    """Inert without the block's own switch."""

    def rule(config: Any) -> str | None:
        return None if getattr(config, name).enabled is True else f"acts with {name}.enabled"

    rule.__doc__ = f"acts with {name}.enabled"
    return rule


_TENSORBOARD, _CSV = _where_enabled("tensorboard"), _where_enabled("csv_monitor")
_JSONL = _where_enabled("jsonl_monitor")
_WANDB, _COMET, _TRACKIO = _where_enabled("wandb"), _where_enabled("comet"), _where_enabled("trackio")
_PROFILER, _COMMS = _where_enabled("flops_profiler"), _where_enabled("comms_logger")
_FOLDER = "folder, made where it is missing; relative to where the script runs"
_JOB = "a folder of this name in output_path"


@dataclass(frozen=True)
class Tensorboard:
    """TensorBoard's event files, written by rank 0: Train/Samples/lr, train_loss, ... over the samples seen."""

    enabled: bool = key(False, "write events; needs the package tensorboard")
    output_path: str = key("", _FOLDER, inert=_TENSORBOARD)
    job_name: str = key("DeepSpeedJobName", _JOB, inert=_TENSORBOARD)


@dataclass(frozen=True)
class CsvMonitor:
    """CSV files, one for each name, written by rank 0: samples seen, value."""

    enabled: bool = key(False, "write files")
    output_path: str = key("", _FOLDER, inert=_CSV)
    job_name: str = key("DeepSpeedJobName", _JOB, inert=_CSV)


@dataclass(frozen=True)
class JsonlMonitor:
    """tritonspeed's own: steps.jsonl, a line of JSON for each step with all that engine.last_step says."""

    enabled: bool = key(False, "tritonspeed's own: write the file; figures that are not finite are null")
    output_path: str = key("", _FOLDER, inert=_JSONL)
    job_name: str = key("DeepSpeedJobName", _JOB, inert=_JSONL)


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases, by rank 0; a run that has begun is gone on with."""

    enabled: bool = key(False, "log the run; needs the package wandb")
    group: str | None = key(None, "group of runs", inert=_WANDB)
    team: str | None = key(None, "team, wandb's entity", inert=_WANDB)
    project: str = key("deepspeed", "name of the project", inert=_WANDB)


@dataclass(frozen=True)
class Comet:
    """Comet, by rank 0; what is null is read by Comet itself from .comet.config or COMET_* variables."""

    enabled: bool = key(False, "log the run; needs the package comet_ml, 3.41 or later")
    samples_log_interval: int = key(100, "samples between two values of a name", low=0, inert=_COMET)
    project: str | None = key(None, "name of the project", inert=_COMET)
    workspace: str | None = key(None, "name of the workspace", inert=_COMET)
    api_key: str | None = key(None, "key of the account", inert=_COMET)
    experiment_name: str | None = key(None, "name of the run", inert=_COMET)
    experiment_key: str | None = key(None, "key of the run", inert=_COMET)
    online: bool | None = key(None, "false keeps the run in files", inert=_COMET)
    mode: str | None = key(None, "get, create or get_or_create", inert=_COMET)


@dataclass(frozen=True)
class Trackio:
    """Trackio, by rank 0."""

    enabled: bool = key(False, "log the run; needs the package trackio")
    project: str = key("deepspeed", "name of the project", inert=_TRACKIO)


@dataclass(frozen=True)
class CommsLogger:
    """A record of the engine's collectives: operation, bytes, count, latency, bandwidths. ``engine.comms_summary()``
    and ``deepspeed.comm.log_summary()`` log the table."""

    enabled: bool = key(False, "record collectives")
    verbose: bool = key(False, "log each, on rank 0", inert=_COMMS)
    prof_all: bool = key(True, "record all; false: those of prof_ops", inert=_COMMS)
    debug: bool = key(False, "name the function that asked for each", inert=_COMMS)
    prof_ops: list[str] = key(
        [], "record these: all_gather_into_tensor, reduce_scatter_tensor, broadcast, exchange", inert=_COMMS
    )


@dataclass(frozen=True)
class FlopsProfiler:
    """Operations, parameters and time of each module in one step, on rank 0. Products are counted, not the rest."""

    enabled: bool = key(
        False,
        "a table of one step, in the log or in output_file; the step before is counted, and runs uncompiled for it",
    )
    recompute_fwd_factor: float = key(
        0.0,
        "forwards that a backward repeats; counted, so it acts only where engine.backward() is not called",
        low=0,
        inert=_PROFILER,
    )
    profile_step: int = key(1, "steps before the one that is profiled", low=0, inert=_PROFILER)
    module_depth: int = key(-1, "levels of modules in the table; -1 is all", low=-1, inert=_PROFILER)
    top_modules: int = key(1, "classes of modules named for each level", low=0, inert=_PROFILER)
    detailed: bool = key(True, "a row for each module", inert=_PROFILER)
    output_file: str | None = key(None, "file of the table; null is the log", inert=_PROFILER)


@dataclass(frozen=True)
class ThroughputTimer:
    """The line of samples, tokens and operations per second."""

    enabled: bool = key(True, "say it every steps_per_print steps")
    synchronized: bool = key(
        True,
        "wait for the device",
        inert="a line covers many steps, and each ends with the norm that the host waits for",
    )


@dataclass(frozen=True)
class Timers:
    """Timers."""

    throughput: ThroughputTimer = block(ThroughputTimer, "throughput")
