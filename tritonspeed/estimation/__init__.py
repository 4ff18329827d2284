"""Bytes and seconds before anything runs: ``memory`` what a rank holds, by the run's own order, on integers;
``activations`` what a forward and backward hold besides, by a run on shapes alone."""

from tritonspeed.estimation.activations import Activations, activation_bytes, measure_activations
from tritonspeed.estimation.memory import Estimate, estimate

__all__ = ["Activations", "Estimate", "activation_bytes", "estimate", "measure_activations"]
