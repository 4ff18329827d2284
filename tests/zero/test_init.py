"""zero.Init: a model that is cut while it is built has the values it would have had, and trains as it would have."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, Plain, one_pass, sgd
from models import Block, Net, batch
from tolerances import tolerance
from torch import nn
from torch.nn import functional as F

import tritonspeed as ts
import tritonspeed.zero.init as zero_init
from tritonspeed.zero.group import group_of

CLOSE = tolerance(torch.float32, 4096)


class InitInConstructor(Net):
    """Initialises in every way that constructors do it, after the children exist."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__(depth=3, tied=tied)
        self.scale = nn.Parameter(torch.ones(5))
        nn.init.normal_(self.head.weight, std=0.3)
        self.blocks[0].up.weight.data.mul_(2.0)
        with torch.no_grad():
            self.blocks[1].down.bias.copy_(torch.arange(13.0))
            self.norm.weight[3] = 7.0
        self.apply(self.init_linear)
        for name, p in self.named_parameters():
            if name.endswith("mix.weight"):
                nn.init.constant_(p, 0.1)
        assert float(self.blocks[2].mix.weight.mean()) == pytest.approx(0.1), "what was written can be read"

    def init_linear(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()
            module.weight.data.normal_(0.0, 0.2)


class FusedHead(Net):
    """Reads its head's weight without calling the head, which is large enough to be a unit of its own."""

    def __init__(self) -> None:
        super().__init__(vocab=97)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        logits = F.linear(self.hidden(tokens), self.head.weight)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, -2), targets.flatten())


class TwoTypesAtOnce(nn.Module):
    """One module that owns parameters of two dtypes, trainable and frozen, and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Module()
        inner.a = nn.Parameter(torch.randn(5, 3))
        inner.b = nn.Parameter(torch.randn(7, dtype=torch.bfloat16))
        inner.c = nn.Parameter(torch.randn(2), requires_grad=False)
        inner.register_buffer("steps", torch.arange(3))
        self.inner = inner


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "tied": lambda: Net(tied=True),
    "initialised in its constructor": InitInConstructor,
    "tied, initialised in its constructor": lambda: InitInConstructor(tied=True),
    "two types": TwoTypesAtOnce,
    "reads a weight from elsewhere": FusedHead,
}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    with ts.zero.GatheredParameters(model.parameters()):
        return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def built(name: str) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    plain = MODELS[name]()
    torch.manual_seed(rank)  # rank 0's values are everyone's
    with ts.zero.Init():
        model = MODELS[name]()
    managed = [p for p in model.parameters() if group_of(p) is not None]
    assert len(managed) >= len(list(model.parameters())) - 1  # the root's own join when it is trained
    assert all(p.isnan().all() for p in managed), "sharded after the context"
    want = dict(plain.named_parameters(remove_duplicate=False))
    got = values(model)
    assert list(got) == list(want)
    for key, value in got.items():
        torch.testing.assert_close(value, want[key].detach(), rtol=0, atol=0, msg=lambda text, k=key: f"{k}: {text}")
        assert dict(model.named_parameters(remove_duplicate=False))[key].requires_grad == want[key].requires_grad
    assert not any(isinstance(m._parameters, zero_init.GuardedParameters) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_rank_0_without_init(ranks: Any, name: str) -> None:
    ranks(2, built, name)


def train(model: nn.Module, plain: Plain, stage: int) -> None:
    rank = dist.get_rank()
    options = ts.zero.ShardOptions(param_persistence_threshold=30)
    model, optimizer = ts.zero.shard(model, sgd(model.parameters()), stage=stage, options=options)
    for step in range(3):
        loss = one_pass(model, rank, step)
        optimizer.step()
        torch.testing.assert_close(loss, plain.step(step)[rank], **CLOSE)
    got = model._tritonspeed.full_state_dict(rank0_only=False)
    torch.testing.assert_close(got, dict(plain.model.state_dict()), **CLOSE)
    assert not any(isinstance(h, zero_init.Unready) for m in model.modules() for h in m._forward_pre_hooks.values())


def built_and_trained(name: str, stage: int) -> None:
    plain = Plain(Case(MODELS[name]), dist.get_world_size())
    torch.manual_seed(dist.get_rank())
    with ts.zero.Init():
        model = MODELS[name]()
    train(model, plain, stage)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", ["tied", "initialised in its constructor", "reads a weight from elsewhere"])
def test_trained_after_init_equals_trained_without(ranks: Any, name: str, stage: int) -> None:
    ranks(2, built_and_trained, name, stage)


def finished_module(stage: int) -> None:
    plain = Plain(Case(), dist.get_world_size())
    torch.manual_seed(dist.get_rank())
    model = Net()
    ts.zero.Init(module=model)
    assert all(p.isnan().all() for p in model.parameters())
    train(model, plain, stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_finished_module(ranks: Any, stage: int) -> None:
    ranks(2, finished_module, stage)


def not_yet_ready() -> None:
    with ts.zero.Init():
        model = Net()
    with pytest.raises(ValueError, match="built under zero.Init and nobody gathers"):
        model(*batch(0, 0))
    with pytest.raises(ValueError, match="cannot be pickled"):
        pickle.dumps(model)
    with ts.zero.GatheredParameters(model.parameters()):
        assert not model(*batch(0, 0)).isnan()


def test_its_forward_before_it_is_trained_is_refused(ranks: Any) -> None:
    ranks(2, not_yet_ready)


def copied_before_it_trains() -> None:
    torch.manual_seed(0)
    plain = Net(depth=2, tied=True)
    torch.manual_seed(0)
    with ts.zero.Init():
        model = Net(depth=2, tied=True)
        inner = copy.deepcopy(model.blocks[0])  # as constructors do: nn.TransformerEncoder
        model.more = inner
    assert group_of(inner.up.weight) not in (None, group_of(model.blocks[0].up.weight))
    del model.more
    twin, block = copy.deepcopy(model), copy.deepcopy(model.blocks[1])
    assert not any(group_of(p) for p in [*twin.parameters(), *block.parameters()])
    torch.testing.assert_close(dict(twin.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(dict(block.state_dict()), dict(plain.blocks[1].state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(values(inner), dict(plain.blocks[0].named_parameters()), rtol=0, atol=0)
    assert len(list(twin.parameters())) == len(list(plain.parameters())), "tied weights stay tied"
    assert float(twin(*batch(0, 0))) == float(plain(*batch(0, 0)))
    assert all(p.isnan().all() for p in model.parameters()), "the model is as it was"
    pickle.loads(pickle.dumps(twin))


def test_a_deep_copy_has_the_values(ranks: Any) -> None:
    """PEFT copies the layer that is trained beside the adapters; constructors copy blocks."""
    ranks(2, copied_before_it_trains)


def contexts() -> None:
    torch.manual_seed(0)
    plain = Net()
    torch.manual_seed(0)
    with ts.zero.Init(enabled=False):
        model = Net()
    assert not any(group_of(p) for p in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)

    torch.manual_seed(0)
    with ts.zero.Init(), ts.zero.Init(enabled=False), ts.zero.Init():
        first = Net()
    torch.testing.assert_close(values(first), dict(plain.named_parameters()), rtol=0, atol=0)

    hooks_before = len(nn.modules.module._global_module_registration_hooks)
    with pytest.raises(ZeroDivisionError), ts.zero.Init():
        Net()
        raise ZeroDivisionError
    assert len(nn.modules.module._global_module_registration_hooks) == hooks_before == 0
    assert not zero_init.is_building()
    ordinary = Net()
    assert not any(group_of(p) for p in ordinary.parameters())
    with ts.zero.Init():
        second = Net()
    assert all(group_of(p) for p in second.parameters())


def test_nested_disabled_and_after_an_exception(ranks: Any) -> None:
    ranks(2, contexts)


def from_meta(stage: int, tied: bool) -> None:
    torch.manual_seed(dist.get_rank())
    with torch.device("meta"):
        model = Net(tied=tied)
    identities = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    model, optimizer = ts.zero.shard(model, sgd(model.parameters()), stage=stage)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == identities
    got = model._tritonspeed.full_state_dict(rank0_only=False)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, got)
    torch.testing.assert_close(everyone[0], everyone[1], rtol=0, atol=0)
    assert (got["norm.weight"] == 1).all() and got["embed.weight"].std() == pytest.approx(1, abs=0.2)
    assert not any(value.isnan().any() for value in got.values())
    if tied:
        assert torch.equal(got["embed.weight"], got["head.weight"])
    loss = one_pass(model, 0, 0)
    optimizer.step()
    assert one_pass(model, 0, 0) < loss


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_from_meta(ranks: Any, stage: int, tied: bool) -> None:
    ranks(2, from_meta, stage, tied)


class NoReset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


def test_from_meta_without_reset_parameters_is_an_error() -> None:
    with torch.device("meta"):
        model = nn.Sequential(NoReset())
    with pytest.raises(ValueError, match=r"NoReset has parameters on the meta device and no reset_parameters\(\)"):
        ts.zero.shard(model, None)


class Deep(nn.Module):
    """Notes the bytes of whole parameters that this rank holds, after each block made and each block written."""

    def __init__(self, depth: int, held: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(Block(64))
            held.append(resident_bytes(self))
        for block in self.blocks:
            for p in block.parameters():
                nn.init.ones_(p)
            held.append(resident_bytes(self))


def resident_bytes(model: nn.Module) -> int:
    """Bytes behind the parameters as they are, storages counted once."""
    storages = {}
    for module in model.modules():
        for p in filter(lambda p: p is not None, dict.values(module._parameters)):
            storages[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    return sum(storages.values())


def never_whole(depth: int) -> None:
    block_elems = sum(p.numel() for p in Block(64).parameters())
    held: list[int] = []
    usual, zero_init.OPEN_AT_MOST_ELEMS = zero_init.OPEN_AT_MOST_ELEMS, 2 * block_elems
    try:
        with ts.zero.Init() as init:
            model = Deep(depth, held)
    finally:
        zero_init.OPEN_AT_MOST_ELEMS = usual
    padded = 1.5  # alignment of small parameters
    assert max(held[:depth]) < 1_000, "nothing but placeholders between two blocks"
    assert 4 * block_elems < max(held[depth:]) <= 2 * 4 * block_elems * padded, (
        "what is written is open, two blocks at most"
    )
    assert resident_bytes(model) < 1_000
    share = 4 * block_elems * depth / dist.get_world_size()
    assert share <= init.ledger.bytes_of["parameters"] <= padded * share
    assert init.ledger.bytes_of["communication"] == 0
    assert all((value == 1).all() for value in values(model).values())


@pytest.mark.parametrize("world", [2, 3])
def test_no_rank_ever_holds_the_whole_model(ranks: Any, world: int) -> None:
    ranks(world, never_whole, 12)


def tied_and_written_late() -> None:
    """The tied weight is found, through the head, after it has been closed: with room for one open module."""
    usual, zero_init.OPEN_AT_MOST_ELEMS = zero_init.OPEN_AT_MOST_ELEMS, 1
    try:
        with ts.zero.Init():
            model = Net(tied=True)
            nn.init.ones_(model.norm.weight)
            nn.init.constant_(model.head.weight, 3.0)
            nn.init.ones_(model.norm.bias)
    finally:
        zero_init.OPEN_AT_MOST_ELEMS = usual
    with ts.zero.GatheredParameters(model.parameters()):
        assert model.head.weight is model.embed.weight and (model.embed.weight == 3).all()
        assert (model.norm.bias == 1).all()


def test_a_tied_weight_is_written_through_either_name(ranks: Any) -> None:
    ranks(2, tied_and_written_late)


def written_through_its_state_dict() -> None:
    """As transformers 4 initialises what a checkpoint lacks: it gathers the tensors of a state dict."""
    with ts.zero.Init():
        model = Net()
    head = [tensor for name, tensor in model.state_dict().items() if name.startswith("head.")]
    others = [torch.ones(3), torch.tensor(1.0), torch.empty(2, device="meta"), nn.Parameter(torch.ones(1))]
    with ts.zero.GatheredParameters([*others, *head], modifier_rank=0):
        assert group_of(model.norm.weight) is not None and model.norm.weight.isnan().all()
        nn.init.constant_(model.head.weight, 2.0 + dist.get_rank())
    with ts.zero.GatheredParameters(model.parameters()):
        assert (model.head.weight == 2).all() and not model.norm.weight.isnan().any()


def test_what_a_state_dict_shows_stands_for_its_parameters(ranks: Any) -> None:
    ranks(2, written_through_its_state_dict)
