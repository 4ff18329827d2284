"""The compile lane: machine code of every kernel for every GPU we support, none of which is here.

No spills, shared memory in bounds, wide loads whatever the shape, tensor cores in products. What was found is kept in
docs/compiled-kernels.md; ``python tests/kernels/test_machine_code.py`` writes it anew.
"""

import importlib
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import builds
import pytest
import torch
from lanes import compiled

from tritonspeed.kernels._triton import recording, triton
from tritonspeed.kernels.cards import CARDS, KIB
from tritonspeed.kernels.machine_code import machine_code
from tritonspeed.kernels.store import SHIPPED, FolderStore, Layers
from tritonspeed.kernels.tuned import use_stores

PAGE = Path(__file__).parents[2] / "docs" / "compiled-kernels.md"
NUM_WORKERS = 2
MODULES = sorted(module.name for module in pkgutil.iter_modules(builds.__path__))


@dataclass(frozen=True)
class Found:
    """One kernel of one build on one card."""

    kernel: str
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load: int
    num_tensor_core: int


@cache
def builds_of(module: str) -> dict[str, builds.Build]:
    return importlib.import_module(f"builds.{module}").BUILDS


def compile_all(module: str, build: str, card_name: str) -> list[Found]:
    """Record the build's launches for a card and compile each: in a worker process."""
    torch.set_num_threads(1)
    use_stores([Layers([FolderStore(SHIPPED)])])  # what everybody has; a user's own folder is another matter
    card = CARDS[card_name]
    with recording(card) as launches:
        builds_of(module)[build].call()
    assert launches, "the build launched nothing"
    found = {}
    for launched in launches:
        code = machine_code(launched, card)
        name = launched.kernel.__name__.strip("_").removesuffix("_kernel")
        row = Found(
            name, launched.options["num_warps"], code.registers, code.spilled_bytes, code.shared_bytes,
            code.widest_load, code.num_tensor_core,
        )  # fmt: skip
        found[row] = None
    return list(found)


CASES = [
    (module, build, card)
    for module in MODULES
    for build, what in builds_of(module).items()
    for card in what.cards or CARDS
]


@cache
def everything() -> dict[tuple[str, str, str], list[Found] | BaseException]:
    """All cases, compiled by a pool: Triton keeps what it compiled, so that a second run takes seconds."""
    with ProcessPoolExecutor(NUM_WORKERS, mp_context=get_context("spawn")) as pool:
        futures = {case: pool.submit(compile_all, *case) for case in CASES}
        return {case: future.exception() or future.result() for case, future in futures.items()}


@compiled
@pytest.mark.parametrize(("module", "build", "card_name"), CASES)
def test_compiles_lean(module: str, build: str, card_name: str) -> None:
    found = everything()[module, build, card_name]
    if isinstance(found, BaseException):
        raise found
    what, card = builds_of(module)[build], CARDS[card_name]
    for row in found:
        assert row.spilled_bytes == 0, row
        assert row.shared_bytes <= card.max_shared_bytes, row
        assert row.widest_load >= what.widest_load, row
    if what.uses_tensor_cores:
        assert any(row.num_tensor_core for row in found), found


def table() -> str:
    """The page: a line per build and kernel, the cards that agree side by side."""
    lines = [
        "# What the compiler made of the kernels",
        "",
        f"Written by `python tests/kernels/test_machine_code.py` with triton {triton.__version__}; the tests hold it.",
        "Each cell: registers a thread / KiB of shared memory a block / bytes of the widest global load, and `T` where",
        "the kernel uses tensor cores. No cell spills. Each is launched as the heuristic does on that card.",
        "",
    ]
    for module in MODULES:
        lines += [
            f"## {module}",
            "",
            "| build | kernel | " + " | ".join(CARDS) + " |",
            "|---|---|" + "---|" * len(CARDS),
        ]
        for build, what in builds_of(module).items():
            cells: dict[str, dict[str, list[str]]] = {}
            for card in what.cards or CARDS:
                rows = everything()[module, build, card]
                assert not isinstance(rows, BaseException), (module, build, card, rows)
                for row in rows:
                    shared = f"{row.shared_bytes / KIB:.2g}"
                    cell = f"{row.registers}/{shared}/{row.widest_load}{'T' if row.num_tensor_core else ''}"
                    cells.setdefault(row.kernel, {}).setdefault(card, []).append(cell)
            for kernel, by_card in cells.items():
                line = " | ".join(", ".join(by_card.get(card, ["-"])) for card in CARDS)
                lines.append(f"| {build} | {kernel} | {line} |")
        lines.append("")
    return "\n".join(lines)


@compiled
def test_the_page_is_what_the_compiler_says() -> None:
    page = PAGE.read_text()
    if f"triton {triton.__version__};" not in page:
        pytest.skip(f"the page was written with another triton than {triton.__version__}")
    assert page == table(), "run `python tests/kernels/test_machine_code.py`"


if __name__ == "__main__":
    PAGE.write_text(table())
