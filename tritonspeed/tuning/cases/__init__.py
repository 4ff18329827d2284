"""What there is to tune and to measure: one module per family of kernels, each with ``cases(model, dtype)``."""

import importlib
import pkgutil
from collections.abc import Iterable

import torch

from tritonspeed.tuning.case import Case
from tritonspeed.tuning.shapes import ModelShapes


def families() -> list[str]:
    """The names of the modules here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def all_cases(
    models: Iterable[ModelShapes], dtype: torch.dtype, names: Iterable[str] | None = None
) -> dict[str, list[Case]]:
    """Cases by family, each shape once though several models have it.

    Args:
        models: whose shapes.
        dtype: of activations and weights.
        names: families or operations ("norms", "layer_norm"); None is all.

    Raises:
        ValueError: a name that is neither.
    """
    wanted = None if names is None else set(names)
    unknown = set() if wanted is None else wanted - set(families())
    chosen: dict[str, list[Case]] = {}
    operations: set[str] = set()
    models = tuple(models)
    for family in families():
        module = importlib.import_module(f"{__name__}.{family}")
        by_label = {case.label: case for model in models for case in module.cases(model, dtype)}
        operations |= {case.name for case in by_label.values()}
        kept = [c for c in by_label.values() if wanted is None or family in wanted or c.name in wanted]
        if kept:
            chosen[family] = kept
    if unknown - operations:
        raise ValueError(
            f"no cases for {', '.join(sorted(unknown - operations))}; families: {', '.join(families())};"
            f" operations: {', '.join(sorted(operations))}"
        )
    return chosen
