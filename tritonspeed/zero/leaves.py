"""Modules that are never split into units: fetched whole, whichever of their children a rank calls.

Names and signatures are DeepSpeed's (``deepspeed.utils.set_z3_leaf_modules`` and its kin). Set them before
``initialize``: that is when units are made. Blocks of a ModuleList are whole units already, mixture-of-experts ones
included; "leaf_module" in the config marks leaves too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark modules by their classes, or by the names of these.

    Returns:
        The modules that were marked.

    Raises:
        ValueError: no module of the model is of these classes.
    """
    return _mark(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Take the mark off again; otherwise as ``set_z3_leaf_modules``."""
    return _mark(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark one module, or take its mark off."""
    model._z3_leaf = flag  # type: ignore[assignment]


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by their names in ``model.named_modules()``.

    Returns:
        (the modules, the names that there are none of).

    Raises:
        ValueError: there are such names.
    """
    return _mark_named(model, module_names, flag, raise_if_not_found, lambda name, wanted: name == wanted)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by the ends of their names; otherwise as ``set_z3_leaf_modules_by_name``."""
    return _mark_named(model, module_name_suffixes, flag, raise_if_not_found, str.endswith)


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether this module is marked."""
    return bool(getattr(model, "_z3_leaf", False))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are marked."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def _mark(model: nn.Module, classes: Sequence[type | str], flag: bool, must_find: bool) -> list[nn.Module]:
    wanted = {c if isinstance(c, str) else f"{c.__module__}.{c.__qualname__}" for c in classes}
    found = [m for m in model.modules() if wanted & _names_of(m)]
    if not found and must_find:
        have = sorted({type(m).__name__ for m in model.modules()})
        names = sorted(c if isinstance(c, str) else c.__name__ for c in classes)
        raise ValueError(f"no module of {names} in the model: it has {', '.join(have)}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _names_of(module: nn.Module) -> set[str]:
    """The names that a class, or one that it inherits from, can be asked for by."""
    kinds = type(module).__mro__
    return {cls.__name__ for cls in kinds} | {f"{cls.__module__}.{cls.__qualname__}" for cls in kinds}


def _mark_named(
    model: nn.Module, wanted: Sequence[str], flag: bool, must_find: bool, fits: Callable[[str, str], bool]
) -> tuple[list[nn.Module], list[str]]:
    names = dict(model.named_modules())
    missing = [each for each in wanted if not any(fits(name, each) for name in names)]
    if missing and must_find:
        raise ValueError(f"no module is named {missing} in the model: it has {', '.join(filter(None, names))}")
    found = [module for name, module in names.items() if any(fits(name, each) for each in wanted)]
    for module in found:
        set_z3_leaf_module(module, flag)
    return found, missing
