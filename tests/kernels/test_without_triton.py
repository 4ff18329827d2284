"""Where Triton is not installed everything imports, CPU tensors work, and a GPU tensor gets a plain answer."""

import subprocess
import sys
import textwrap

SCRIPT = """
    import sys
    sys.modules["triton"] = None  # what a missing package looks like to `import`
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from tritonspeed.kernels import adamw_, global_norm

    p, m, v, g = torch.ones(4, 100)
    adamw_(p, m, v, g, step=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    assert 0.8 < p[0] < 1 and (p == p[0]).all()
    assert global_norm([g])[0] == 10
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            global_norm([torch.empty(3, device="cuda")])
        except ValueError as error:
            print(error)
"""


def test_the_cpu_forms_stand_alone() -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "the tensors are on cuda:0 but Triton is not installed here" in done.stdout
