"""Leaf modules by class, name and suffix: the flag that keeps a module one unit."""

from __future__ import annotations

import pytest
from torch import nn

import tritonspeed as ts


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 5)


class Wide(Expert):
    pass


def model() -> nn.Sequential:
    return nn.Sequential(Expert(), Wide(), nn.Linear(3, 3))


@pytest.mark.parametrize("wanted", [Expert, "Expert", f"{__name__}.Expert"])
def test_by_class_with_those_that_inherit_from_it(wanted: type | str) -> None:
    net = model()
    assert ts.zero.set_z3_leaf_modules(net, [wanted]) == [net[0], net[1]]
    assert ts.zero.get_z3_leaf_modules(net) == [net[0], net[1]]
    assert ts.zero.z3_leaf_module(net[0]) and not ts.zero.z3_leaf_module(net[2])
    assert ts.zero.unset_z3_leaf_modules(net, [Wide]) == [net[1]]
    assert ts.zero.get_z3_leaf_modules(net) == [net[0]]


def test_one_by_hand_by_name_and_by_suffix() -> None:
    net = model()
    ts.zero.set_z3_leaf_module(net[2], True)
    assert ts.zero.set_z3_leaf_modules_by_name(net, ["0"]) == ([net[0]], [])
    assert ts.zero.get_z3_leaf_modules(net) == [net[0], net[2]]
    assert ts.zero.set_z3_leaf_modules_by_suffix(net, [".up"]) == ([net[0].up, net[1].up], [])
    assert ts.zero.set_z3_leaf_modules_by_name(net, ["0", "x"], False, raise_if_not_found=False) == ([net[0]], ["x"])
    assert ts.zero.get_z3_leaf_modules(net) == [net[0].up, net[1].up, net[2]]


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"no module of \['Attention'\] in the model: it has Expert, Linear,"):
        ts.zero.set_z3_leaf_modules(model(), ["Attention"])
    assert ts.zero.set_z3_leaf_modules(model(), ["Attention"], raise_if_not_found=False) == []
    with pytest.raises(ValueError, match=r"no module is named \['x'\] in the model: it has 0, 0.up,"):
        ts.zero.set_z3_leaf_modules_by_name(model(), ["0", "x"])
