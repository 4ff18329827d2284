"""DeepSpeed's names for memory estimates, with its signatures and our figures.

    estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=8)

The ``_all_`` forms are called for what they show: the table is logged (logger "tritonspeed", to standard error where
nobody has set up logging) and returned. The figures are those of ``ts.estimate`` for this package's own run in bf16
under AdamW, as host bytes per node and device bytes per rank, at their peak and without activations. DeepSpeed's own
formulas count other buffers; theirs and ours are not to be compared across the two programs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from tritonspeed.estimation.forecast import Forecast, estimate
from tritonspeed.estimation.shapes import ModelShape
from tritonspeed.zero.stages import stage_of

_log = logging.getLogger("tritonspeed")
_MASTER_BYTES = 4


def estimate_zero2_model_states_mem_needs(
    total_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int]:
    """(host bytes per node, device bytes per rank) of stage 2 for a transformer of about ``total_params``.

    Args:
        total_params: elements.
        num_gpus_per_node, num_nodes: ranks.
        cpu_offload: masters and moments are in host memory.
        additional_buffer_factor: headroom: the host bytes are multiplied by it.
    """
    shape = ModelShape.of_count(total_params)
    forecast = _forecast(shape, 2, num_gpus_per_node, num_nodes, cpu_offload, False)
    return _host_bytes(forecast, True, additional_buffer_factor), forecast.total_peak_bytes


def estimate_zero3_model_states_mem_needs(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
) -> tuple[int, int, int]:
    """(host bytes per node, device bytes per rank, bytes of the largest layer and its gradient) of stage 3.

    Args:
        total_params: elements of a transformer.
        largest_layer_params: of the largest module; the device holds it whole, with its gradient.
        num_gpus_per_node, num_nodes: ranks.
        cpu_offload, cpu_offload_params: masters and moments, and parameter shards, are in host memory.
        zero_init: the model is built sharded; otherwise every rank of a node first holds it whole, in fp32.
        additional_buffer_factor: headroom: the host bytes are multiplied by it.
    """
    shape = ModelShape.of_count(total_params)
    forecast = _forecast(shape, 3, num_gpus_per_node, num_nodes, cpu_offload, cpu_offload and cpu_offload_params)
    largest = 2 * 2 * largest_layer_params
    host = _host_bytes(forecast, not zero_init, additional_buffer_factor)
    return host, max(forecast.total_peak_bytes, largest), largest


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> str:
    """A table of what stage 2 needs for ``model``, with and without offload: logged and returned."""
    return _table(ModelShape.of(model), 2, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: int, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> str:
    """The same for a transformer of about ``total_params`` elements."""
    return _table(ModelShape.of_count(total_params), 2, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module, num_gpus_per_node: int = 1, num_nodes: int = 1, additional_buffer_factor: float = 1.5
) -> str:
    """A table of what stage 3 needs for ``model`` under each kind of offload: logged and returned."""
    return _table(ModelShape.of(model), 3, num_gpus_per_node, num_nodes, additional_buffer_factor)


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: int,
    largest_layer_params: int,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
) -> str:
    """The same for a transformer of about ``total_params``, whose largest module has ``largest_layer_params``."""
    shape = ModelShape.of_count(total_params)
    return _table(shape, 3, num_gpus_per_node, num_nodes, additional_buffer_factor, 4 * largest_layer_params)


def _forecast(shape: ModelShape, stage: int, gpus: int, nodes: int, optimizer: bool, params: bool) -> Forecast:
    zero: dict[str, Any] = {"stage": stage}
    if optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if params:
        zero["offload_param"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
    return estimate(shape, config, gpus * nodes, device="cuda", nodes=nodes)


def _host_bytes(forecast: Forecast, builds_whole: bool, factor: float) -> int:
    """Of a node, while it trains or, where that is more, while its ranks build the model."""
    built = _MASTER_BYTES * forecast.num_parameters * forecast.work.ranks_per_node if builds_whole else 0
    return int(max(forecast.node_host_bytes, built) * factor)


def _options(shards_parameters: bool) -> Iterator[tuple[bool, bool, bool]]:
    """(optimizer offloaded, parameters offloaded, built sharded), in DeepSpeed's order."""
    for optimizer in (True, False):
        for params in (True, False) if shards_parameters and optimizer else (False,):
            for sharded in (True, False) if shards_parameters else (False,):
                yield optimizer, params, sharded


def _table(shape: ModelShape, stage: int, gpus: int, nodes: int, factor: float, at_least: int = 0) -> str:
    lines = [
        f"Stage {stage}, {shape.num_params:,} parameters, {nodes} node(s) of {gpus}: memory of parameters, gradients"
        " and optimizer at the peak of a step, in GiB",
        "  host per node | device per rank | options",
    ]
    shards_parameters = stage_of(stage).shards_parameters
    known: dict[tuple[bool, bool], Forecast] = {}
    for optimizer, params, sharded in _options(shards_parameters):
        if (optimizer, params) not in known:
            known[optimizer, params] = _forecast(shape, stage, gpus, nodes, optimizer, params)
        forecast = known[optimizer, params]
        host, device = _host_bytes(forecast, not sharded, factor), max(forecast.total_peak_bytes, at_least)
        options = [f"offload_optimizer={'cpu' if optimizer else 'none'}"]
        if shards_parameters:
            options = [f"offload_param={'cpu' if params else 'none'}", *options, f"zero_init={int(sharded)}"]
        lines.append(f"  {host / 2**30:13.2f} | {device / 2**30:15.2f} | {', '.join(options)}")
    text = "\n".join(lines)
    _show(text)
    return text


def _show(text: str) -> None:
    """Log it, where somebody sees it."""
    if not _log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
    _log.info("%s", text)
