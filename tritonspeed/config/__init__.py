"""Every knob, once, in DeepSpeed's vocabulary. Imports neither torch nor anything above it.

config = load("ds_config.json").resolve(world_size=8, facts=ModelFacts(hidden_size=4096, dtype="bfloat16"))
config.zero_optimization.stage; config.answers()
"""

from tritonspeed.config.answers import Answer, Verdict
from tritonspeed.config.auto import ModelFacts
from tritonspeed.config.config import Config, ConfigWarning, load

__all__ = ["Answer", "Config", "ConfigWarning", "ModelFacts", "Verdict", "load"]
