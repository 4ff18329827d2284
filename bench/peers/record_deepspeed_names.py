"""DeepSpeed's public names, for the test that each of them has an answer here.

    PEER_PYTHON bench/peers/record_deepspeed_names.py tests/integrations/deepspeed_0_19_8_names.txt

PEER_PYTHON is the interpreter of an environment with real DeepSpeed in it (bench/peers/setup.sh). Its sources are read,
not run: a module's public names are the classes, functions and values that stand at its top level; a package's are also
those that it takes from other modules of DeepSpeed. One line per module; names that are only values of a config's keys
(ALL_CAPITALS outside a package) are left out.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

NOT_IMPORTED = ("csrc", "tests", "op_builder.hpu", "op_builder.npu", "op_builder.mlu", "op_builder.xpu")
WITHOUT_NAMES = (  # nobody imports from inside these but DeepSpeed itself: their modules are listed, not their names
    *("compile.", "inference.v2", "model_implementations.", "module_inject.auto_ep", "module_inject.containers"),
    *("ops.op_builder.", "ops.transformer.", "ops.triton_ops.", "autotuning.", "nvme.", "moe.ep_"),
)


def main() -> None:
    """Write the list."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None, "there is no DeepSpeed in this environment"
    version = importlib.metadata.version("deepspeed")
    assert "tritonspeed" not in version, "this is tritonspeed's façade: give real DeepSpeed's interpreter"
    root = Path(spec.origin).parent
    lines = [f"# public names of DeepSpeed {version}, by bench/peers/record_deepspeed_names.py"]
    for path in sorted(root.rglob("*.py")):
        place = ".".join(("deepspeed", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        if not any(part in place for part in NOT_IMPORTED):
            inner = [] if place.startswith(tuple(f"deepspeed.{part}" for part in WITHOUT_NAMES)) else public_names(path)
            lines.append(" ".join((f"{place}:", *inner)))
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


def public_names(path: Path) -> list[str]:
    """Names at the top level of a file."""
    package = path.name == "__init__.py"
    found = {name for name in _names(path, package) if not name.startswith("_")}
    return sorted(name for name in found if package or not name.isupper())


def _names(path: Path, package: bool) -> Iterator[str]:
    for node in _top_level(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
        elif isinstance(node, ast.ImportFrom) and package and (node.level or (node.module or "").startswith("deepsp")):
            for alias in node.names:
                if alias.name != "*":
                    yield alias.asname or alias.name
                elif (source := path.parent / f"{node.module}.py").exists():
                    yield from (name for name in public_names(source))


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those under its ifs and trys too."""
    for node in body:
        yield node
        for field in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
                yield from _top_level(getattr(node, field, []))


if __name__ == "__main__":
    main()
