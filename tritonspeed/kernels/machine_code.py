"""What the compiler makes of a launch, for GPUs that need not be here: registers, spills, shared memory, widths.

Triton's wheel carries the assemblers of NVIDIA and LLVM's for AMD. A launch is recorded with ordinary CPU tensors (only
their types, addresses and sizes matter), then compiled for any card:

    with recording(CARDS["sm_90"]) as launches:
        launch_adamw_(...)
    print(machine_code(launches[0], CARDS["sm_90"]))
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

from tritonspeed.kernels._triton import Launched, triton
from tritonspeed.kernels.cards import Card
from tritonspeed.kernels.tuned import dtype_name

TENSOR_CORE = {"cuda": r"\b(?:wgmma|mma\.sync|tcgen05\.mma)\b", "hip": r"\bv_(?:s?mfma|s?wmma)_"}
_AMD_BYTES = {
    "ubyte": 1, "sbyte": 1, "byte": 1, "u8": 1, "i8": 1, "b8": 1, "ushort": 2, "sshort": 2, "short": 2, "u16": 2,
    "i16": 2, "b16": 2, "dword": 4, "b32": 4, "dwordx2": 8, "b64": 8, "dwordx3": 12, "b96": 12, "dwordx4": 16,
    "b128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What the machine code says. Global loads and stores are counted by their width in bytes.

    Attributes:
        registers: of one thread.
        spilled_bytes: of one thread; 0 is what a shipped configuration must have.
        shared_bytes: of one block.
        loads, stores: width in bytes → instructions; asynchronous copies to shared memory count as loads.
        num_tensor_core: instructions that multiply matrices.
        ttir: Triton's first intermediate language.
        assembly: PTX or AMD's assembly.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    loads: Counter[int]
    stores: Counter[int]
    num_tensor_core: int
    ttir: str
    assembly: str

    @property
    def widest_load(self) -> int:
        """Bytes of the widest global load, 0 without one."""
        return max(self.loads, default=0)


def _argument(value: Any, specialize: bool) -> tuple[str, bool, Any]:
    """(Triton's type, divisible by 16, value if it is a constant) of one argument, as a real launch would see them."""
    if value is None:
        return "constexpr", False, None
    if isinstance(value, Tensor):
        return "*" + dtype_name(value.dtype), value.data_ptr() % 16 == 0, None
    if isinstance(value, bool):
        return "i1", False, None
    if isinstance(value, int):
        if specialize and value == 1:
            return "constexpr", False, 1
        return "i32" if -(2**31) <= value < 2**31 else "i64", specialize and value % 16 == 0, None
    assert isinstance(value, float), f"an argument of type {type(value).__name__} has no place in a signature"
    return "fp32", False, None


@dataclass(frozen=True)
class Recipe:
    """A launch as the compiler sees it, without its tensors: equal recipes compile to equal code, in any process.

    Attributes:
        module, kernel: where the ``@triton.jit`` function is found.
        signature: each argument's name and Triton's type.
        constants: those that the compiler knows.
        divisible: positions of the arguments that 16 divides.
        options: num_warps and the like.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


def recipe_of(launched: Launched) -> Recipe:
    """What a recorded launch makes the compiler do."""
    kernel, signature, constants, divisible = launched.kernel, {}, {}, []
    by_name = dict(zip(kernel.arg_names, launched.arguments, strict=False)) | launched.constants
    assert set(by_name) == set(kernel.arg_names), f"arguments of {kernel.__name__}: {set(by_name)}"
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = by_name[name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name], is_divisible, constant = _argument(value, not parameter.do_not_specialize)
        if signature[name] == "constexpr":
            constants[name] = constant
        elif is_divisible:
            divisible.append(i)
    named = (tuple(part.items()) for part in (signature, constants, launched.options))
    signature_items, constant_items, option_items = named
    return Recipe(
        kernel.fn.__module__, kernel.fn.__qualname__, signature_items, constant_items, tuple(divisible), option_items
    )


def machine_code(launched: Launched, card: Card) -> MachineCode:
    """Compile a recorded launch for a card.

    Raises:
        RuntimeError: the compiler or assembler refused it.
    """
    return compile_recipe(recipe_of(launched), card, launched.kernel)


def compile_recipe(recipe: Recipe, card: Card, kernel: Any = None) -> MachineCode:
    """Compile a recipe for a card.

    Args:
        kernel: the function, where it cannot be imported by name.

    Raises:
        RuntimeError: the compiler or assembler refused it.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        kernel or getattr(import_module(recipe.module), recipe.kernel),
        signature=dict(recipe.signature),
        constexprs=dict(recipe.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in recipe.divisible},
    )
    options = dict(recipe.options)
    target = GPUTarget(card.backend, card.compute_capability or card.arch, card.warp_size)
    binary = triton.compile(source, target=target, options=options)
    if card.backend == "cuda":
        return _read_ptx(binary, card, options["enable_fp_fusion"])
    return _read_amdgcn(binary)


@cache
def _assembler(arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(arch).path


def _read_ptx(binary: Any, card: Card, fp_fusion: bool) -> MachineCode:
    ptx = binary.asm["ptx"]
    gpu = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert gpu is not None, "PTX names its target"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        fused = [] if fp_fusion else ["--fmad=false"]
        command = [
            _assembler(card.compute_capability),
            "-v",
            *fused,
            f"--gpu-name={gpu[1]}",
            file.name,
            "-o",
            "/dev/null",
        ]
        log = subprocess.run(command, capture_output=True, text=True)
    if log.returncode:
        raise RuntimeError(f"the assembler refused {binary.metadata.name} for {card.arch}:\n{log.stderr}")
    said = log.stderr + log.stdout
    spills, registers = re.findall(r"(\d+) bytes spill", said), re.findall(r"Used (\d+) registers", said)
    assert spills and registers, f"the assembler reports spills and registers: {said}"
    loads = _ptx_widths(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    loads.update(
        int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x\w+|\d+)(?:, |;)", ptx) if size
    )
    return MachineCode(
        registers=max(map(int, registers)),
        spilled_bytes=sum(map(int, spills)),
        shared_bytes=binary.metadata.shared,
        loads=loads,
        stores=_ptx_widths(r"st\.global\S*?(?:\.v(\d))?\.[bfus](\d+)", ptx),
        num_tensor_core=len(re.findall(TENSOR_CORE["cuda"], ptx)),
        ttir=binary.asm["ttir"],
        assembly=ptx,
    )


def _ptx_widths(pattern: str, ptx: str) -> Counter[int]:
    return Counter(int(lanes or 1) * int(bits) // 8 for lanes, bits in re.findall(pattern, ptx))


def _read_amdgcn(binary: Any) -> MachineCode:
    assembly = binary.asm["amdgcn"]
    spills = re.findall(r"\.(?:[vs]gpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly)
    registers = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
    assert spills and registers, "the assembly reports spills and registers"
    widths = []
    for access in ("load", "store"):
        found = re.findall(rf"(?:buffer|global)_{access}_(?:d16_hi_|d16_|lds_)?(\w+)", assembly)
        widths.append(Counter(_AMD_BYTES[width.removesuffix("_d16").removesuffix("_d16_hi")] for width in found))
    return MachineCode(
        registers=max(map(int, registers)),
        spilled_bytes=sum(map(int, spills)),
        shared_bytes=binary.metadata.shared,
        loads=widths[0],
        stores=widths[1],
        num_tensor_core=len(re.findall(TENSOR_CORE["hip"], assembly)),
        ttir=binary.asm["ttir"],
        assembly=assembly,
    )
