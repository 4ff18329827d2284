"""Which parameter belongs to which unit of communication, and in which bucket of it.

One unit per repeated block (the children of a ModuleList or Sequential that are of one class), one for each large
module outside the blocks (an embedding, a head), and one, the root, for the rest. A parameter that several units use is
the root's. Small parameters that stay whole at stage 3 (``param_persistence_threshold``) stand together in one more
unit. The plan depends on the model and the thresholds alone, never on the stage: that is why stages agree to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import Parameter

from tritonspeed.precision import Policy
from tritonspeed.zero.layout import Layout, lay_out

ROOT, PERSISTENT = "root", "persistent"


@dataclass(frozen=True)
class LeafRules:
    """Modules that are never split: fetched whole, whichever of their children a rank calls (MoE blocks)."""

    classes: tuple[type | str, ...] = ()
    names: tuple[str, ...] = ()
    name_suffixes: tuple[str, ...] = ()

    def match(self, name: str, module: nn.Module) -> bool:
        """Whether ``module``, known as ``name`` in its model, is such a leaf."""
        if getattr(module, "_z3_leaf", False):
            return True
        kinds = {cls.__name__ for cls in type(module).__mro__}
        kinds |= {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
        wanted = {c if isinstance(c, str) else f"{c.__module__}.{c.__qualname__}" for c in self.classes}
        return bool(kinds & wanted) or name in self.names or name.endswith(self.name_suffixes or ("\0",))


@dataclass
class UnitPlan:
    """One unit: its name, the modules whose call needs it, and its parameters, with their names, in module order."""

    name: str
    modules: list[nn.Module] = field(default_factory=list)
    parameters: list[tuple[str, Parameter]] = field(default_factory=list)


@dataclass(frozen=True)
class BucketTypes:
    """The dtypes of one bucket. ``reduce`` is the wire's; None takes whatever the gradient stands in."""

    compute: torch.dtype
    master: torch.dtype
    accumulate: torch.dtype
    reduce: torch.dtype | None

    @classmethod
    def of(cls, p: Parameter, policy: Policy | None, wire: torch.dtype | None) -> BucketTypes:
        """What ``policy`` says of ``p``. None, like fp32, leaves every parameter its own dtype, with fp32 masters."""
        policy = policy or Policy.of(torch.float32)
        own = policy.param == torch.float32 or not p.is_floating_point()
        wide = torch.float64 if p.dtype == torch.float64 else None
        return cls(p.dtype if own else policy.param, wide or policy.master, wide or policy.accumulate, wire)


@dataclass(frozen=True)
class BucketPlan:
    """One bucket before it exists: names, places and types of its parameters."""

    name: str
    layout: Layout
    parameters: list[Parameter]
    types: BucketTypes
    persistent: bool

    @property
    def trainable(self) -> bool:
        return self.parameters[0].requires_grad


def plan_buckets(unit: UnitPlan, world: int, policy: Policy | None, wire: torch.dtype | None) -> list[BucketPlan]:
    """The unit's parameters by (dtype, trainable or frozen), placed over ``world`` ranks.

    Matrices stand first, so that the usual two optimizer groups (with and without weight decay) are two contiguous
    runs.
    """
    found: dict[tuple[str, bool], list[tuple[str, Parameter]]] = {}
    for name, p in unit.parameters:
        compute = BucketTypes.of(p, policy, wire).compute
        found.setdefault((f"{compute} {p.dtype == torch.float64}", p.requires_grad), []).append((name, p))
    plans = []
    for number, (_, members) in enumerate(sorted(found.items())):
        members = sorted(members, key=lambda item: item[1].ndim < 2)
        types = BucketTypes.of(members[0][1], policy, wire)
        layout = lay_out([(name, tuple(p.shape)) for name, p in members], types.compute.itemsize, world)
        name = f"{unit.name}.{number}" if number else unit.name
        plans.append(BucketPlan(name, layout, [p for _, p in members], types, unit.name == PERSISTENT))
    return plans


def repeated_blocks(model: nn.Module, leaves: LeafRules) -> dict[str, nn.Module]:
    """Outermost repeated blocks and leaf modules of ``model``: {name: module}, in registration order."""
    blocks: dict[str, nn.Module] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        counts: dict[type, int] = {}
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for child in module.children():
                counts[type(child)] = counts.get(type(child), 0) + 1
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if not any(True for _ in child.parameters()):
                continue
            if leaves.match(path, child) or (counts.get(type(child), 0) > 1 and not _is_container(child)):
                blocks[path] = child
            else:
                visit(path, child)

    visit("", model)
    return blocks


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _large_modules(model: nn.Module, blocks: dict[str, nn.Module], at_least: int) -> dict[str, nn.Module]:
    """Modules outside the blocks that own ``at_least`` elements themselves: embeddings, heads."""
    inside = {id(m) for block in blocks.values() for m in block.modules()}
    found = {}
    for name, module in model.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if name and id(module) not in inside and own >= at_least and not any(module.children()):
            found[name] = module
    return found


def plan_units(
    model: nn.Module,
    leaves: LeafRules | None = None,
    persistence_threshold: int = 0,
    model_persistence_threshold: int | None = None,
) -> list[UnitPlan]:
    """Every parameter of ``model`` in exactly one unit; the root first, then registration order, persistent last.

    Args:
        model: any module; tied parameters count once.
        leaves: modules never to split.
        persistence_threshold: parameters with fewer elements stay whole at stage 3.
        model_persistence_threshold: no more elements than this in all stay whole; None is no bound.
    """
    blocks = repeated_blocks(model, leaves or LeafRules())
    smallest = min((sum(p.numel() for p in b.parameters()) for b in blocks.values()), default=0)
    candidates = dict(blocks)
    if blocks:
        candidates |= _large_modules(model, blocks, smallest)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    candidates = dict(sorted(candidates.items(), key=lambda item: order[item[0]]))

    owners: dict[int, set[str]] = {}  # parameter -> units that use it
    for name, module in candidates.items():
        for p in module.parameters():
            owners.setdefault(id(p), set()).add(name)
    inside = {id(m) for unit in candidates.values() for m in unit.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for p in module.parameters(recurse=False):
                owners.setdefault(id(p), set()).add(ROOT)

    units = {ROOT: UnitPlan(ROOT, [model])} | {name: UnitPlan(name, [m]) for name, m in candidates.items()}
    persistent, budget = UnitPlan(PERSISTENT), model_persistence_threshold
    for name, p in model.named_parameters():
        if p.numel() < persistence_threshold and (budget is None or p.numel() <= budget):
            persistent.parameters.append((name, p))
            budget = None if budget is None else budget - p.numel()
            continue
        users = owners[id(p)]
        units[next(iter(users)) if len(users) == 1 else ROOT].parameters.append((name, p))
    units[ROOT].modules += _users_of(model, units[ROOT].parameters)
    return [unit for unit in [*units.values(), persistent] if unit.parameters or unit.name == ROOT]


def _users_of(model: nn.Module, parameters: Sequence[tuple[str, Parameter]]) -> list[nn.Module]:
    """The modules below ``model`` that own any of ``parameters`` directly: they may be called without the root."""
    wanted = {id(p) for _, p in parameters}
    below = list(model.modules())[1:]
    return [m for m in below if any(id(p) in wanted for p in m.parameters(recurse=False))]
