"""Modules made of the table in ``names``: each attribute is looked up when it is first used.

So ``import deepspeed`` loads neither torch nor the engine, and a name that is refused costs nothing until it is used.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from tritonspeed.integrations import names


class _Refused(type):
    """The class of what stands where a refused name is: importable, good for ``isinstance``, an error when used."""

    _place: str
    _says: str

    def _raise(cls) -> Any:
        raise NotImplementedError(f"{cls._place} is not provided by tritonspeed: {cls._says}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        cls._raise()

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks every object for
            raise AttributeError(name)
        cls._raise()


def refused(place: str, says: str) -> Any:
    """A class in place of a name that is not provided.

    Args:
        place: the name, in full.
        says: what to do instead.

    Returns:
        A class that raises NotImplementedError when it, or a subclass of it, is called, or asked for an attribute.
    """
    return _Refused(place.rpartition(".")[2], (), {"_place": place, "_says": says, "__module__": place})


class FacadeModule(ModuleType):
    """A module whose attributes come from the table."""

    def __getattr__(self, name: str) -> Any:
        place = f"{self.__name__}.{name}"
        row = names.MODULES[self.__name__].get(name)
        if row is not None:
            value = refused(place, row.note) if row.target is None else find(row.target)
        elif place in names.MODULES:
            value = import_module(place)
        else:
            raise AttributeError(f"{place} is not provided by tritonspeed: {names.reason(place)}")
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *names.children(self.__name__)})

    @property
    def __all__(self) -> list[str]:
        return names.children(self.__name__)


def find(target: str) -> Any:
    """The object at ``"module:attribute"``, or the module at ``"module"``."""
    module_name, _, attribute = target.partition(":")
    module = import_module(module_name)
    if module_name.startswith("tritonspeed.") and not module_name.startswith("tritonspeed.integrations.names"):
        import_module("tritonspeed.integrations.parameters").show()
    value: Any = module
    for part in filter(None, attribute.split(".")):
        value = getattr(value, part)
    return value
