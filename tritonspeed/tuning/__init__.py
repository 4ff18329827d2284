"""Launch configurations found by measuring: asked for explicitly, kept in a file, read by ``kernels.tuned``.

    ts.tuning.tune(cases)                      search on this machine's GPU; ``tritonspeed tune`` from a shell
    ts.tuning.use(directory="/shared/tuned")   look there
    ts.tuning.use(deterministic=True)          shipped configurations and heuristics alone

``case``, ``cases/``  one operation at one shape, type and direction; those of every family of kernels
``shapes``            the sizes of real models
``planning``          which decisions a case depends on, their candidates, which of these compile well
``tuner``, ``timing``, ``verify``  the search, its clock, and its check of the numbers
``ranks``             one rank tunes for all
"""

from tritonspeed.tuning.api import tune, use, use_unless_chosen
from tritonspeed.tuning.case import Case
from tritonspeed.tuning.cases import all_cases
from tritonspeed.tuning.planning import Job, plan, prune
from tritonspeed.tuning.shapes import MODELS, ModelShapes, load_shapes
from tritonspeed.tuning.tuner import Outcome, Search, Tuner

__all__ = [
    "MODELS",
    "Case",
    "Job",
    "ModelShapes",
    "Outcome",
    "Search",
    "Tuner",
    "all_cases",
    "load_shapes",
    "plan",
    "prune",
    "tune",
    "use",
    "use_unless_chosen",
]
