"""DeepSpeed's checkpoints: read as sources, its universal folders written too.

torch_file   a .pt file as data: nothing in it is called          files       one tag, a file or more of each rank
layout       where each parameter's elements are                  unsharded   stage 0, where states have no names
facts        counters, scaler, schedule, settings                 universal   a folder per parameter
values       what the sources here have in common
"""

from tritonspeed.checkpoint.deepspeed.files import DeepSpeedCheckpoint
from tritonspeed.checkpoint.deepspeed.universal import LATEST, UniversalCheckpoint, write_universal

__all__ = ["LATEST", "DeepSpeedCheckpoint", "UniversalCheckpoint", "write_universal"]
