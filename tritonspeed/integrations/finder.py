"""How Python comes to find ``deepspeed``: the folder ``path/`` on sys.path, or a finder in sys.meta_path.

    on the path      ``tritonspeed run`` and ``tritonspeed env`` put ``path/`` into PYTHONPATH: it reaches torchrun,
                     ``accelerate launch`` and every subprocess
    in the process   ``import tritonspeed.hf`` puts a ``Finder`` first; nothing else changes

Both end at the same modules (``facade``) and the same metadata. Hugging Face asks both importlib.util.find_spec and
importlib.metadata, and decides while it is imported: hence "first line".
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from tritonspeed.integrations import names
from tritonspeed.integrations.facade import FacadeModule, not_provided
from tritonspeed.log import speak
from tritonspeed.version import __version__

log = logging.getLogger("tritonspeed")

FOLDER = Path(__file__).parent / "path"
FORCE_VARIABLE = "TRITONSPEED_AS_DEEPSPEED"
SAID_VARIABLE = "TRITONSPEED_SAID"  # inherited: of a launcher, its ranks and what they start, one says who answers
_DECIDED_BY = (  # modules that look for deepspeed while they are imported
    *("accelerate", "transformers.integrations.deepspeed", "transformers.trainer"),
    *("lightning.fabric.strategies.deepspeed", "lightning_fabric.strategies.deepspeed"),
)


class _FacadeLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return FacadeModule(spec.name, f"DeepSpeed's names, by tritonspeed {__version__}")

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "deepspeed":
            module.__file__ = str(FOLDER / "deepspeed" / "__init__.py")
            _announce()


class _MainLoader(Loader):
    """What ``python -m deepspeed.launcher.runner`` runs: the table's ``main`` of that module."""

    def __init__(self, module_name: str) -> None:
        self._code = f"import sys\nfrom {module_name} import main\nsys.exit(main())\n"

    def get_code(self, fullname: str) -> Any:
        return compile(self._code, f"<{fullname}>", "exec")


class Finder(DistributionFinder):
    """Finds ``deepspeed``, its submodules and its metadata, without a file of that name on the path."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The spec of a module of the table.

        Raises:
            ModuleNotFoundError: a submodule that is not provided, with the alternative.
        """
        if fullname.partition(".")[0] != "deepspeed":
            return None
        parent, _, last = fullname.rpartition(".")
        if last == "__main__" and "main" in names.MODULES.get(parent, {}):
            return ModuleSpec(fullname, _MainLoader(parent), origin=str(FOLDER / "deepspeed"))
        if fullname not in names.MODULES:
            # Without `name`: `from deepspeed.zero import something` asks for a module last, and where that error names
            # this module, Python drops it for a "cannot import name" of its own, which does not say why.
            raise ModuleNotFoundError(not_provided(fullname))
        spec = ModuleSpec(fullname, _FacadeLoader(), origin=str(FOLDER / "deepspeed"), is_package=True)
        spec.submodule_search_locations = []
        return spec

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Any]:
        """The metadata, where ``deepspeed``'s, or everyone's, is asked for."""
        wanted = None if context is None else context.name
        if (wanted is None or wanted.lower() == "deepspeed") and str(FOLDER) not in sys.path:
            yield from importlib.metadata.MetadataPathFinder.find_distributions(
                DistributionFinder.Context(name="deepspeed", path=[str(FOLDER)])
            )


def installed_deepspeed(places: Sequence[str] | None = None) -> str | None:
    """The version of a real DeepSpeed in this environment, and its place if nobody installed it; None without one.

    Args:
        places: folders to look in; None is ``sys.path``, and what import hooks of editable installations find.
    """
    context = DistributionFinder.Context(name="deepspeed", path=list(places or sys.path))
    for found in importlib.metadata.distributions(context=context):
        if "+tritonspeed" not in found.version:
            return found.version
    spec = PathFinder.find_spec("deepspeed", [place for place in places or sys.path if place != str(FOLDER)])
    if spec is None or spec.origin is None:  # nothing, or a folder that happens to have the name
        return None
    root = Path(spec.origin).parent
    said = root.parent / "version.txt"  # of a checkout
    return f"{said.read_text().strip() if said.is_file() else 'of an unknown version'} in {root}"


def is_forced() -> bool:
    """Whether tritonspeed is to stand in although a real DeepSpeed is installed (TRITONSPEED_AS_DEEPSPEED=1)."""
    return os.environ.get(FORCE_VARIABLE, "").lower() in ("1", "true", "yes")


def real_deepspeed(env: Mapping[str, str]) -> str | None:
    """The real DeepSpeed that a process started with these variables is left with; None: ``path_variables`` gives ours.

    Args:
        env: its environment.
    """
    return None if is_forced() else installed_deepspeed() or installed_deepspeed(_python_path(env))


def path_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that make ``deepspeed`` mean tritonspeed in a process that is started with them.

    Args:
        env: the environment that they are added to.

    Returns:
        PYTHONPATH, with the façade's folder first; without it where there is a real DeepSpeed and nobody forces this.
    """
    first = [str(FOLDER)] if real_deepspeed(env) is None else []
    return {"PYTHONPATH": os.pathsep.join([*first, *_python_path(env)])} if first or "PYTHONPATH" in env else {}


def _python_path(env: Mapping[str, str]) -> list[str]:
    return [place for place in env.get("PYTHONPATH", "").split(os.pathsep) if place and place != str(FOLDER)]


def is_active() -> bool:
    """Whether ``import deepspeed`` gives tritonspeed in this process."""
    loaded = sys.modules.get("deepspeed")
    if loaded is not None:
        return isinstance(loaded, FacadeModule)
    spec = importlib.util.find_spec("deepspeed")
    return spec is not None and str(spec.origin).startswith(str(FOLDER))


def install() -> None:
    """Make ``deepspeed`` mean tritonspeed from here on, in this process. A no-op where it does already.

    Raises:
        ImportError: a real DeepSpeed is installed, and nobody forces this; or a module that looks for deepspeed while
            it is imported has been imported already, and has not found it.
    """
    if is_active():
        return
    real = installed_deepspeed()
    if real is not None and not is_forced():
        raise ImportError(
            f"there is a DeepSpeed {real}, and tritonspeed does not take its place in silence: set"
            f" {FORCE_VARIABLE}=1, or remove it, or leave `import tritonspeed.hf` out to use DeepSpeed"
        )
    late = [name for name in ("deepspeed", *_DECIDED_BY) if name in sys.modules]
    if late:
        raise ImportError(
            f"`import tritonspeed.hf` comes too late: {', '.join(late)} is imported already and has looked for"
            " deepspeed. Make it the first import of the script, or start the script with `tritonspeed run`"
        )
    sys.meta_path.insert(0, Finder())


def take_over(module_name: str) -> None:
    """From ``path/deepspeed/__init__.py``: the module being imported there becomes the façade's.

    Args:
        module_name: "deepspeed".
    """
    finder = Finder()
    if not any(isinstance(each, Finder) for each in sys.meta_path):
        sys.meta_path.insert(0, finder)
    spec = finder.find_spec(module_name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)


def _announce() -> None:
    """Once per run, on rank 0: which engine answers."""
    if os.environ.get("RANK", "0") != "0" or os.environ.get(SAID_VARIABLE):
        return
    os.environ[SAID_VARIABLE] = "1"
    speak()
    real = installed_deepspeed()
    if real is None:
        log.info("`deepspeed` is tritonspeed %s here", __version__)
    else:
        log.warning("`deepspeed` is tritonspeed %s here, in place of the DeepSpeed %s", __version__, real)
