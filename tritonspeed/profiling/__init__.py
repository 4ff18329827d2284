"""Where the time of a step goes: tables, a log of collectives, a trace of a few steps. Listens, and decides nothing.

``units``      when each unit's forward and backward begin and end
``breakdown``  the table of ``wall_clock_breakdown``
``comms``      the table of ``comms_logger``
``recorded``, ``trace``, ``chrome``, ``timeline``   a trace of a few steps: its data, its recording, its two pictures
``watch``      the listeners of one engine
``flops_formulas``, ``flops_count``, ``flops_table``   operations of a call; of every module; as values and a table
``flops_step``, ``flops_profiler``   the ``flops_profiler`` block; DeepSpeed's FlopsProfiler and get_model_profile
``throughput``, ``reduce_time``      the line of every ``steps_per_print``; what backward waited for gradients
"""

from tritonspeed.profiling.breakdown import StepTimes
from tritonspeed.profiling.comms import (
    get_comm_operation_count,
    get_logged_comm_ops,
    has_comm_data,
    log_summary,
    reset_log,
)
from tritonspeed.profiling.trace import Trace
from tritonspeed.profiling.watch import Watch

__all__ = [
    "StepTimes",
    "Trace",
    "Watch",
    "get_comm_operation_count",
    "get_logged_comm_ops",
    "has_comm_data",
    "log_summary",
    "reset_log",
]
