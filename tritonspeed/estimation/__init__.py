"""Bytes and seconds before anything runs: ``memory`` what a rank holds, by the run's own order, on integers."""

from tritonspeed.estimation.memory import Estimate, estimate

__all__ = ["Estimate", "estimate"]
