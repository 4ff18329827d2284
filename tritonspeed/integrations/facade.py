"""Modules made of the table in ``names``: each attribute is looked up when it is first used.

So ``import deepspeed`` loads neither torch nor the engine, and a name that is refused costs nothing until it is used.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from tritonspeed.integrations import names

_WITHOUT_TORCH = ("tritonspeed.integrations.facts", "tritonspeed.cli")


class NotProvided(NotImplementedError, AttributeError):
    """An attribute of a name that stands for nothing here was asked for: ``hasattr`` says False, as of any other."""


class _Refused(type):
    """The class of what stands where a refused name is: importable, good for ``isinstance``, an error when used."""

    _place: str
    _says: str

    def _sentence(cls) -> str:
        return f"{cls._place} is not provided by tritonspeed: {cls._says}"

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(cls._sentence())

    def __iter__(cls) -> Any:
        raise NotImplementedError(cls._sentence())

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks every object for
            raise AttributeError(name)
        raise NotProvided(cls._sentence())

    def __repr__(cls) -> str:
        return f"<{cls._place}: not provided by tritonspeed>"


def refused(place: str, says: str) -> Any:
    """A class in place of a name that is not provided.

    Args:
        place: the name, in full.
        says: what to do instead.

    Returns:
        A class that raises NotImplementedError when it, or a subclass of it, is called, iterated, or asked for an
        attribute.
    """
    module, _, name = place.rpartition(".")
    return _Refused(name, (), {"_place": place, "_says": says, "__module__": module})


class FacadeModule(ModuleType):
    """A module whose attributes come from the table."""

    def __getattr__(self, name: str) -> Any:
        place = f"{self.__name__}.{name}"
        row = names.MODULES[self.__name__].get(name)
        if place in names.MODULES:
            value = import_module(place)
        elif row is not None:
            value = refused(place, row.note) if row.target is None else find(row.target)
        else:
            raise AttributeError(not_provided(place), name=name, obj=self)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *names.children(self.__name__)})

    @property
    def __all__(self) -> list[str]:
        return [name for name in names.children(self.__name__) if not name.startswith("_")]


def not_provided(place: str) -> str:
    """What is said of a name or a module that the table has not."""
    return (
        f"{place} is not provided by tritonspeed, which stands in for deepspeed here: {names.reason(place)}"
        " (its docs/deepspeed-names.md lists what is)"
    )


def find(target: str) -> Any:
    """The object at ``"module:attribute"``, or the module at ``"module"``."""
    module_name, _, attribute = target.partition(":")
    value: Any = import_module(module_name)
    if module_name.startswith("tritonspeed.") and not module_name.startswith(_WITHOUT_TORCH):
        import_module("tritonspeed.integrations.parameters").show()
    for part in filter(None, attribute.split(".")):
        value = getattr(value, part)
    return value
