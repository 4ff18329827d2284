"""Blocks that watch a run. None of them changes a number of the training, so none of them stops it: where a
monitor is not built, its key is inert, and the answer says where the same facts are found."""

from dataclasses import dataclass
from typing import Any

from tritonspeed.config.keys import key

MONITOR_NOTE = "monitors are not built yet: the facts of each step are in engine.last_step"
PROFILER_NOTE = "the profiler is not built yet: use torch.profiler around engine()"
COMMS_NOTE = "the logger is not built yet: a stuck exchange is reported with the place of each rank"


@dataclass(frozen=True)
class Tensorboard:
    """TensorBoard event files."""

    enabled: bool = key(False, "write events", inert=MONITOR_NOTE)
    output_path: str = key("", "directory", inert=MONITOR_NOTE)
    job_name: str = key("DeepSpeedJobName", "name of the run", inert=MONITOR_NOTE)


@dataclass(frozen=True)
class CsvMonitor:
    """CSV files."""

    enabled: bool = key(False, "write files", inert=MONITOR_NOTE)
    output_path: str = key("", "directory", inert=MONITOR_NOTE)
    job_name: str = key("DeepSpeedJobName", "name of the run", inert=MONITOR_NOTE)


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases."""

    enabled: bool = key(False, "log the run", inert=MONITOR_NOTE)
    group: str | None = key(None, "group of runs", inert=MONITOR_NOTE)
    team: str | None = key(None, "team", inert=MONITOR_NOTE)
    project: str = key("deepspeed", "project", inert=MONITOR_NOTE)


@dataclass(frozen=True)
class Comet:
    """Comet."""

    enabled: bool = key(False, "log the run", inert=MONITOR_NOTE)
    samples_log_interval: int = key(100, "samples between two logs", inert=MONITOR_NOTE)
    project: str | None = key(None, "project", inert=MONITOR_NOTE)
    workspace: str | None = key(None, "workspace", inert=MONITOR_NOTE)
    api_key: str | None = key(None, "key", inert=MONITOR_NOTE)
    experiment_name: str | None = key(None, "name of the run", inert=MONITOR_NOTE)
    experiment_key: str | None = key(None, "key of the run", inert=MONITOR_NOTE)
    online: bool | None = key(None, "log to the server", inert=MONITOR_NOTE)
    mode: str | None = key(None, "get, create or either", inert=MONITOR_NOTE)


@dataclass(frozen=True)
class Trackio:
    """Trackio."""

    enabled: bool = key(False, "log the run", inert=MONITOR_NOTE)
    project: str = key("deepspeed", "project", inert=MONITOR_NOTE)


@dataclass(frozen=True)
class CommsLogger:
    """A record of every collective."""

    enabled: bool = key(False, "record collectives", inert=COMMS_NOTE)
    verbose: bool = key(False, "print each", inert=COMMS_NOTE)
    prof_all: bool = key(True, "record all", inert=COMMS_NOTE)
    debug: bool = key(False, "name the caller", inert=COMMS_NOTE)
    prof_ops: list[str] = key([], "record these", inert=COMMS_NOTE)


@dataclass(frozen=True)
class FlopsProfiler:
    """Operations and time per module."""

    enabled: bool = key(False, "profile one step", inert=PROFILER_NOTE)
    recompute_fwd_factor: float = key(0.0, "extra forwards per step", inert=PROFILER_NOTE)
    profile_step: int = key(1, "which step", inert=PROFILER_NOTE)
    module_depth: int = key(-1, "depth of the table; -1 is all", inert=PROFILER_NOTE)
    top_modules: int = key(1, "rows per depth", inert=PROFILER_NOTE)
    detailed: bool = key(True, "the whole table", inert=PROFILER_NOTE)
    output_file: str | None = key(None, "file of the table", inert=PROFILER_NOTE)


@dataclass(frozen=True)
class Timers:
    """Throughput timer."""

    throughput: dict[str, Any] = key({}, "samples/s", inert="time a step around engine.step(); nothing is synchronised")
