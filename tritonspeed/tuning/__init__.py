"""Launch configurations found by measuring: asked for explicitly, kept in a file, read by ``kernels.tuned``.

``case``    one operation at one shape, type and direction; ``cases/`` has those of every family
``shapes``  the sizes of real models
"""

from tritonspeed.tuning.case import Case
from tritonspeed.tuning.shapes import MODELS, ModelShapes, load_shapes

__all__ = ["MODELS", "Case", "ModelShapes", "load_shapes"]
