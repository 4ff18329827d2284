"""Objects that stand in for DeepSpeed's own."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import torch
from safetensors.torch import save_file

from tritonspeed.integrations.stand_ins import clone_tensors_for_torch_save


def test_a_state_dict_is_cloned_into_memory_of_its_own(tmp_path):
    """An OrderedDict was handed back as it was, and Accelerate's save_model then kept one weight of each unit."""
    flat = torch.arange(6.0)
    state = OrderedDict(a=flat[:2], b=flat[2:6].view(2, 2))
    cloned = clone_tensors_for_torch_save(state)
    assert type(cloned) is OrderedDict and list(cloned) == ["a", "b"]
    assert len({tensor.untyped_storage().data_ptr() for tensor in [*cloned.values(), flat]}) == 3
    assert all(torch.equal(cloned[name], state[name]) for name in state)
    save_file(cloned, tmp_path / "whole.safetensors")  # refuses shared memory


def test_cloning_keeps_the_classes_of_what_holds_tensors():
    pair = namedtuple("pair", "left right")(torch.ones(1), [torch.zeros(2), 3])
    cloned = clone_tensors_for_torch_save({"pair": pair, "word": "w"})
    assert type(cloned["pair"]) is type(pair) and cloned["pair"].right[1] == 3 and cloned["word"] == "w"
    assert cloned["pair"].left is not pair.left and torch.equal(cloned["pair"].left, pair.left)
