"""Models on the meta device: values come from who makes them, one unit at a time, and none are lost without a word."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import one_pass, sgd
from models import Block, Net
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import tritonspeed as ts
from tritonspeed.zero.layout import SLICE_ALIGNMENT_BYTES, round_up
from tritonspeed.zero.meta import materialise


class GPTStyle(Net):
    """Everything is initialised by the root's ``apply``, at the end of its constructor."""

    def __init__(self, tied: bool = False, through_data: bool = False) -> None:
        super().__init__(tied=tied)
        self.through_data = through_data
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """Constants that tell which module made them; a block writes into its children, as some do."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight.data if self.through_data else module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.constant_(module.bias, 3.0)
        elif isinstance(module, nn.Embedding):
            nn.init.constant_(module.weight, 5.0)
        elif isinstance(module, Block):
            nn.init.constant_(module.down.weight, 7.0)


class Hugging(GPTStyle):
    """The method's usual name."""

    def _init_weights(self, module: nn.Module) -> None:
        self.initialise(module)


def on_meta(make: Any, **settings: Any) -> Any:
    with torch.device("meta"):
        return make(**settings)


def assert_initialised(model: Net, tied: bool) -> None:
    with ts.zero.GatheredParameters(model.parameters()):
        for block in model.blocks:
            assert (block.down.weight == 7).all(), "the block came after its children"
            assert (block.down.bias == 3).all() and (block.up.bias == 3).all()
            assert 0.005 < block.up.weight.std() < 0.04 and (block.norm.weight == 1).all()
        assert (model.embed.weight == 5).all() if not tied else model.head.weight is model.embed.weight
        assert 0.005 < model.head.weight.std() < 0.04 or tied


def applied_later(stage: int, tied: bool, through_data: bool) -> None:
    torch.manual_seed(dist.get_rank())
    model = on_meta(GPTStyle, tied=tied, through_data=through_data)
    assert ts.zero.apply_later(model, model.initialise) is model
    options = ts.zero.ShardOptions(param_persistence_threshold=0)
    model, optimizer = ts.zero.shard(model, sgd(model.parameters()), stage=stage, options=options)
    assert_initialised(model, tied)
    loss = one_pass(model, 0, 0)
    optimizer.step()
    assert one_pass(model, 0, 0) < loss


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_top_level_apply_said_again(ranks: Any, stage: int, tied: bool, through_data: bool) -> None:
    ranks(2, applied_later, stage, tied, through_data)


def under_init(tied: bool, through_data: bool) -> None:
    torch.manual_seed(dist.get_rank())
    with ts.zero.Init():
        model = GPTStyle(tied, through_data)
    assert_initialised(model, tied)


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_top_level_apply_under_init(ranks: Any, tied: bool, through_data: bool) -> None:
    ranks(2, under_init, tied, through_data)


def test_initialisation_that_would_be_lost_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"initialised by more than reset_parameters\(\).*apply_later"):
        ts.zero.shard(on_meta(GPTStyle), None)
    with pytest.raises(ValueError, match=r"initialised by more than reset_parameters\(\).*apply_later"):
        ts.zero.shard(on_meta(Hugging, through_data=True), None)
    model = on_meta(Hugging, through_data=True)
    ts.zero.shard(ts.zero.apply_later(model, model._init_weights), None, stage=0)
    assert (model.embed.weight == 5).all()


def test_what_reset_parameters_writes_itself_is_not_taken_for_another_writer() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(3, 4), nn.Embedding(5, 3, padding_idx=1), nn.LayerNorm(4)])
            self.parts += [nn.BatchNorm1d(3), nn.Conv1d(2, 3, 1), nn.Bilinear(2, 3, 4), nn.RMSNorm(4)]

    model = on_meta(Many).bfloat16()
    model.parts[0].weight.requires_grad_(False)
    ts.zero.shard(model, None, stage=0)
    assert not any(p.isnan().any() for p in model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert not model.parts[0].weight.requires_grad
    assert (model.parts[3].running_var == 1).all()


class NoReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))


def test_a_module_without_reset_parameters() -> None:
    model = ts.zero.apply_later(nn.Sequential(on_meta(NoReset)), lambda m: None)
    with pytest.raises(ValueError, match="nothing has written 'weight' of NoReset: say what initialises it"):
        ts.zero.shard(model, None)

    def write(module: nn.Module) -> None:
        if isinstance(module, NoReset):
            module.weight.data.fill_(2.0)
            nn.init.zeros_(module.bias)

    model, _ = ts.zero.shard(ts.zero.apply_later(nn.Sequential(on_meta(NoReset)), write), None, stage=0)
    assert (model[0].weight == 2).all() and (model[0].bias == 0).all()


def test_modules_whose_parameters_cannot_get_memory() -> None:
    with pytest.raises(ValueError, match=r"GRU .*weak references.*zero.Init"):
        ts.zero.shard(on_meta(nn.GRU, input_size=3, hidden_size=4), None)


class Positions(nn.Module):
    """Buffers and no parameters: no unit leads to it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)


class ResetPositions(Positions):
    def reset_parameters(self) -> None:
        self.table.copy_(torch.arange(4.0))


def test_buffers_of_modules_without_parameters() -> None:
    with pytest.raises(ValueError, match="Positions has the buffer 'table' on the meta device and no reset_parameters"):
        ts.zero.shard(nn.Sequential(nn.Linear(3, 3), on_meta(Positions)), None)
    model = nn.Sequential(on_meta(nn.Linear, in_features=3, out_features=3), on_meta(ResetPositions))
    ts.zero.shard(model, None, stage=0)
    assert torch.equal(model[1].table, torch.arange(4.0))


def num_bytes_alive() -> int:
    """Bytes of all the storages that tensors in this process have."""
    storages = {}
    for thing in gc.get_objects():
        is_tensor = issubclass(type(thing), Tensor) and not isinstance(thing, FakeTensor)
        if is_tensor and thing.device.type == "cpu" and thing.layout == torch.strided:  # another test's may be sparse
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


class Noting(nn.Linear):
    """Notes what is alive when it gets its values."""

    held: list[int]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.weight.device.type == "cpu":
            self.held.append(num_bytes_alive())


def test_no_more_than_one_unit_is_whole_while_a_model_is_made() -> None:
    width, depth = 128, 10
    Noting.held = []
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Sequential(Noting(width, width), nn.Tanh()) for _ in range(depth)])
    unit_bytes = 4 * (width * width + width)
    gc.collect()  # what other tests have left
    before = num_bytes_alive()
    options = ts.zero.ShardOptions(param_persistence_threshold=0)
    sharded = ts.zero.ShardedModel(model, 3, None, options)
    assert len(sharded.groups) == depth + 1 and len(Noting.held) == depth
    master_bytes = round_up(unit_bytes, SLICE_ALIGNMENT_BYTES)
    beside_masters = [held - before - number * master_bytes for number, held in enumerate(Noting.held)]
    assert unit_bytes <= max(beside_masters) < 1.01 * unit_bytes


def test_materialise_reads_nothing_where_values_are_sent(tmp_path: Any) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    for reads in (True, False):
        model = on_meta(nn.Linear, in_features=2, out_features=2)
        ts.zero.load_safetensors(model, tmp_path)
        materialise(model, list(model.parameters()), reads)
        assert model.weight.device.type == "cpu" and bool((model.weight == 1).all()) is reads
