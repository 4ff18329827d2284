"""Which of the three lanes a test belongs to.

A kernel is interpreted or compiled from the moment it is defined, so each lane is a process of its own: the
interpreter's is started by test_interpreter_lane.py.
"""

import pytest

from tritonspeed.kernels._triton import HAS_TRITON, INTERPRETED

compiled = pytest.mark.skipif(
    INTERPRETED or not HAS_TRITON, reason="the compiler's lane: triton, TRITON_INTERPRET unset"
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the interpreter's lane: started by test_interpreter_lane.py")
