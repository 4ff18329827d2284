"""The figures of a run, in files and services as it goes on: TensorBoard, CSV, JSON lines, wandb, Comet, Trackio.

``master``   ``MonitorMaster``, the monitor of an engine: what is written of a step, under which names
``outbox``   a thread of its own writes, so that no disk and no network is waited for
``files``    writers of files: CSV, JSON lines, TensorBoard
``services`` writers to services: wandb, Comet, Trackio
"""

from tritonspeed.monitor.master import MonitorMaster, get_monitor_config
from tritonspeed.monitor.outbox import Event

__all__ = ["Event", "MonitorMaster", "get_monitor_config"]
