"""AdamW's machine code, for every GPU we support: no spills, no shared memory, and wide accesses whatever n is."""

import re

import pytest
import torch
from lanes import TARGETS, Built, Target, build, compiled

from tritonspeed.kernels.adamw import AdamWLaunch, _adamw_kernel

SCALARS = ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "weight_decay", "decay", "step_size")
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def build_for(
    machine: Target, grad: torch.dtype, out: torch.dtype | None, *, seed: bool, decoupled: bool, aligned: bool = True
) -> Built:
    launch = AdamWLaunch.heuristic(machine.warp_size)
    pointers = ("master_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "scale_ptr", "found_inf_ptr")
    # n is a plain i64, nothing known of it: the same code runs for odd sizes
    signature = {"grad_ptr": NAMES[grad], "n": "i64", "first_element": "i64", "inverse_root_c2": "fp32"}
    signature |= dict.fromkeys(pointers, "*fp32") | dict.fromkeys(SCALARS, "fp32")
    constants: dict[str, object] = {"DECOUPLED": decoupled, "BLOCK": launch.block, "INTERPRET": False}
    optional = {"out_ptr": out and NAMES[out], "seed": "i64" if seed else None}
    signature |= {name: kind for name, kind in optional.items() if kind is not None}
    constants |= {name: None for name, kind in optional.items() if kind is None}
    return build(_adamw_kernel, machine, signature, constants, launch.num_warps, aligned)


@compiled
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("grad", "out", "stochastic", "decoupled"),
    [
        (torch.bfloat16, torch.bfloat16, False, True),
        (torch.bfloat16, torch.bfloat16, True, True),
        (torch.float16, torch.float16, False, False),
        (torch.float32, None, False, True),
    ],
    ids=["bf16", "bf16_stochastic", "fp16_adam", "fp32_no_copy"],
)
def test_compiles_lean(
    target: str, grad: torch.dtype, out: torch.dtype | None, stochastic: bool, decoupled: bool
) -> None:
    machine = TARGETS[target]
    built = build_for(machine, grad, out, seed=stochastic, decoupled=decoupled)
    assert built.spilled_bytes == 0
    assert built.shared_bytes == 0, "a layout change crept in between loads and stores"
    assert built.loads[16] == (4 if grad == torch.float32 else 3)
    assert built.loads[8] == (0 if grad == torch.float32 else 1), "four 16-bit elements a thread"
    assert built.stores[16] == 3
    assert built.stores[8] == (1 if out else 0)
    widened = re.search(r"(%\S+) = tt\.get_program_id x : i32.*?arith\.extsi \1 : i32 to i64", built.ttir, re.DOTALL)
    assert widened, "the program's index is scaled before it is widened: offsets past 2³¹ would wrap"


@compiled
def test_an_unaligned_pointer_still_compiles_without_spills() -> None:
    """A view that starts off a 16-byte boundary is specialised as such: narrower, but right."""
    built = build_for(TARGETS["sm_90"], torch.bfloat16, None, seed=False, decoupled=True, aligned=False)
    assert built.spilled_bytes == 0
    assert built.loads[16] == 0
