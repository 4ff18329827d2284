"""Bytes and seconds before anything runs.

``memory``           what a rank holds in every tier, by the run's own order, on integers
``activations``      what a forward and backward hold besides, by a run on shapes alone
``shapes``           a model from a config, a folder of safetensors or a count; ``families`` their tensors
``traffic``          the bytes that a step moves over each link; ``links`` how long that takes, and what a run achieved
``machine``          the speeds and sizes of a node; ``calibrate`` measures them here
``forecast``         all of it from one call, ``ts.estimate``
``search``           which settings fit, ranked, each with its config block
``published``        the ZeRO papers' equations; ``deepspeed_names`` DeepSpeed's functions
"""

from tritonspeed.estimation.activations import Activations, activation_bytes, measure_activations
from tritonspeed.estimation.calibrate import calibrate
from tritonspeed.estimation.deepspeed_names import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from tritonspeed.estimation.forecast import Forecast, estimate
from tritonspeed.estimation.links import Achieved, StepTime, achieved, time_of
from tritonspeed.estimation.machine import GPUS, LINKS, Machine, machine_of
from tritonspeed.estimation.memory import Estimate
from tritonspeed.estimation.search import Setting, search
from tritonspeed.estimation.shapes import ModelShape
from tritonspeed.estimation.traffic import Workload

__all__ = [
    "GPUS",
    "LINKS",
    "Achieved",
    "Activations",
    "Estimate",
    "Forecast",
    "Machine",
    "ModelShape",
    "Setting",
    "StepTime",
    "Workload",
    "achieved",
    "activation_bytes",
    "calibrate",
    "estimate",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "machine_of",
    "measure_activations",
    "search",
    "time_of",
]
