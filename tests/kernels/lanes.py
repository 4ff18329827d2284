"""The compile-only lane: machine code for GPUs that are not here, and what it says about itself.

The interpreter's lane is a process of its own (test_interpreter_lane.py), because a kernel is interpreted or compiled
from the moment it is defined.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from tritonspeed.kernels._triton import HAS_TRITON, INTERPRETED, triton

KIB = 1024
compiled = pytest.mark.skipif(
    INTERPRETED or not HAS_TRITON, reason="the compiler's lane: triton, TRITON_INTERPRET unset"
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the interpreter's lane: started by test_interpreter_lane.py")


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the shared memory that one block may have there."""

    backend: str
    arch: int | str
    warp_size: int
    max_shared_bytes: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB),
    "sm_86": Target("cuda", 86, 32, 99 * KIB),
    "sm_89": Target("cuda", 89, 32, 99 * KIB),
    "sm_90": Target("cuda", 90, 32, 227 * KIB),
    "sm_100": Target("cuda", 100, 32, 227 * KIB),
    "sm_120": Target("cuda", 120, 32, 99 * KIB),
    "gfx90a": Target("hip", "gfx90a", 64, 64 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB),
    "gfx950": Target("hip", "gfx950", 64, 160 * KIB),
    "gfx1100": Target("hip", "gfx1100", 32, 64 * KIB),
}


@dataclass(frozen=True)
class Built:
    """What the machine code says. Loads and stores of global memory are counted by their width in bytes."""

    spilled_bytes: int
    shared_bytes: int
    loads: Counter[int]
    stores: Counter[int]
    ttir: str


def build(
    kernel: Any,
    target: Target,
    signature: dict[str, str],
    constants: dict[str, object],
    num_warps: int,
    aligned: bool = True,
) -> Built:
    """Compile a kernel without a GPU.

    Args:
        signature: argument name → "*fp32", "i64", "fp32", ...; those in ``constants`` are left out.
        constants: argument name → value of each ``tl.constexpr``, and None for each absent pointer.
        aligned: pointers stand on 16-byte boundaries.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(signature).isdisjoint(constants) and {*signature, *constants} == set(names), "an argument has no type"
    source = ASTSource(
        kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if aligned and name.endswith("_ptr")},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    binary = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)
    if target.backend == "cuda":
        spilled, widths = _ptx_facts(binary.asm["ptx"], int(target.arch))
    else:
        spilled, widths = _amdgcn_facts(binary.asm["amdgcn"])
    return Built(spilled, binary.metadata.shared, *widths, ttir=binary.asm["ttir"])


def _ptx_facts(ptx: str, arch: int) -> tuple[int, tuple[Counter[int], Counter[int]]]:
    from triton.backends.nvidia.compiler import get_ptxas

    gpu = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert gpu is not None, "PTX names its target"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(arch).path, "-v", "--fmad=false", f"--gpu-name={gpu[1]}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True)
    assert log.returncode == 0, log.stderr
    figures = re.findall(r"(\d+) bytes spill", log.stderr + log.stdout)
    assert figures, "the assembler reports spills"
    counts = []
    for access in ("ld", "st"):
        found = re.findall(rf"{access}\.global\S*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
        counts.append(Counter(int(lanes or 1) * int(bits) // 8 for lanes, bits in found))
    return sum(map(int, figures)), (counts[0], counts[1])


def _amdgcn_facts(assembly: str) -> tuple[int, tuple[Counter[int], Counter[int]]]:
    figures = re.findall(r"\.(?:[vs]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly)
    assert figures, "the assembly reports spills"
    bytes_of = {"ubyte": 1, "ushort": 2, "short": 2, "u16": 2, "b16": 2, "dword": 4, "b32": 4, "dwordx2": 8, "b64": 8}
    bytes_of |= {"dwordx4": 16, "b128": 16}
    counts = []
    for access in ("load", "store"):
        found = re.findall(rf"(?:buffer|global)_{access}_(\w+)", assembly)
        counts.append(Counter(bytes_of[width.removesuffix("_d16")] for width in found))
    return sum(map(int, figures)), (counts[0], counts[1])
