"""DeepSpeed's contract over the parts below: ``initialize`` gives an ``Engine`` that runs a step's events in order."""

from tritonspeed.engine.engine import Engine
from tritonspeed.engine.initialize import add_config_arguments, initialize
from tritonspeed.engine.report import StepReport

__all__ = ["Engine", "StepReport", "add_config_arguments", "initialize"]
