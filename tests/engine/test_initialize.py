"""``ts.initialize``: DeepSpeed's signature, its 4-tuple, and every form in which an argument may come."""

from __future__ import annotations

import argparse
import base64
import inspect
import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engines import SGD, make, same, settings, weights
from models import Net, batch
from torch import Tensor

import tritonspeed as ts


def trained(engine: ts.Engine, steps: int = 2) -> dict[str, Tensor]:
    for step in range(steps):
        engine.backward(engine(*batch(0, step)))
        engine.step()
    return weights(engine)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **SGD["params"])


def without_optimizer(stage: int = 2) -> dict[str, Any]:
    return {k: v for k, v in settings(stage).items() if k != "optimizer"}


def test_the_signature_is_deepspeeds():
    assert list(inspect.signature(ts.initialize).parameters) == [
        *("args", "model", "optimizer", "model_parameters", "training_data", "lr_scheduler", "distributed_port", "mpu"),
        *("dist_init_required", "collate_fn", "config", "mesh_param", "config_params"),
    ]


def test_the_four_things_it_returns():
    data = [batch(0, i) for i in range(4)]
    config = settings(1, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 2}})
    engine, optimizer, loader, schedule = ts.initialize(model=Net(), config=config, training_data=data)
    assert isinstance(engine, ts.Engine) and isinstance(engine, torch.nn.Module)
    assert optimizer is engine.optimizer and isinstance(optimizer, torch.optim.Optimizer)
    assert loader is engine.training_dataloader and len(loader) == 2
    assert schedule is engine.lr_scheduler and engine.scheduler_name() == "WarmupLR"
    assert ts.initialize(model=Net(), config=without_optimizer())[1:] == (None, None, None)


# the config


def test_a_config_in_every_form(tmp_path):
    given = settings(2)
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(given))
    commented = "{\n  # two stages more than one\n" + json.dumps(given)[1:]
    forms: dict[str, dict[str, Any]] = {
        "dict": {"config": given},
        "path": {"config": str(path)},
        "Path": {"config": path},
        "hjson": {"config": commented},
        "base64": {"config": base64.urlsafe_b64encode(json.dumps(given).encode()).decode()},
        "config_params": {"config_params": given},
        "args": {"args": SimpleNamespace(deepspeed_config=str(path))},
        "args and config=None": {"args": SimpleNamespace(deepspeed_config=str(path)), "config": None},
        "config, args without one": {"args": SimpleNamespace(deepspeed_config=None, lr=1), "config": given},
    }
    found = {}
    for name, arguments in forms.items():
        torch.manual_seed(0)
        found[name] = trained(ts.initialize(model=Net(), **arguments)[0])
    assert all(same(found["dict"], other) for other in found.values())


def test_arguments_of_a_script():
    parser = ts.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json", "--local_rank", "1"])
    assert args.deepspeed and args.deepspeed_config == "ds.json" and args.local_rank == 1
    for before in (True, False):  # DeepSpeed's tutorials add it themselves
        parser = argparse.ArgumentParser()
        if before:
            parser.add_argument("--local_rank", type=int, default=7)
        ts.add_config_arguments(parser)
        if not before:
            parser.add_argument("--local_rank", type=int, default=7)
        assert parser.parse_args([]).local_rank == 7


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"config": settings()}, r"needs a model: pass initialize\(model="),
        ({"model": Net()}, "needs a config"),
        ({"model": Net(), "config": settings(), "args": SimpleNamespace(deepspeed_config="x.json")}, "two configs"),
        ({"model": Net(), "config": settings(), "config_params": settings(1)}, "two configs"),
        ({"model": Net(), "config": settings(), "mesh_param": (2, 2)}, "mesh_param"),
        ({"model": Net(), "config": settings(gradient_accumulation_steps=2, train_batch_size=6)}, "micro batch 2"),
        ({"model": Net(), "config": {"gradient_accumulation_steps": 2}}, "alone says nothing"),
        ({"model": Net(), "config": settings(4)}, "stage"),
        ({"model": Net(), "config": settings(optimizer={"type": "OneBitLamb", "params": {}})}, "(?i)lamb"),
    ],
)
def test_mistakes_are_told(arguments, told):
    with pytest.raises(ValueError, match=told):
        ts.initialize(**arguments)


# what is trained, and by which optimizer


def groups(model: Net) -> list[dict[str, Any]]:
    """Two groups; the second stands still."""
    blocks = list(model.blocks.parameters())
    rest = [p for n, p in model.named_parameters() if not n.startswith("blocks")]
    return [{"params": blocks}, {"params": rest, "lr": 0.0}]


FORMS = {
    "none": lambda model: None,
    "list": lambda model: list(model.parameters()),
    "generator": lambda model: model.parameters(),
    "named": lambda model: model.named_parameters(),
    "one group": lambda model: [{"params": list(model.parameters())}],
    "empty": lambda model: [],
}


@pytest.mark.parametrize("by", ["name", "callable"])
@pytest.mark.parametrize("stage", [0, 3])
def test_model_parameters_in_every_form(stage, by):
    config = settings(stage) if by == "name" else without_optimizer(stage)
    given = {} if by == "name" else {"optimizer": sgd}
    want = trained(make(settings(stage)))
    for name, form in FORMS.items():
        torch.manual_seed(0)
        model = Net()
        engine = ts.initialize(model=model, model_parameters=form(model), config=config, **given)[0]
        assert same(want, trained(engine)), name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_groups_keep_their_settings(stage):
    found = []
    for by in ("name", "object", "callable"):
        torch.manual_seed(0)
        model = Net()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        if by == "name":
            engine = ts.initialize(model=model, model_parameters=groups(model), config=settings(stage))[0]
        elif by == "object":
            engine = ts.initialize(model=model, optimizer=sgd(groups(model)), config=without_optimizer(stage))[0]
        else:
            given = {"optimizer": sgd, "model_parameters": groups(model), "config": without_optimizer(stage)}
            engine = ts.initialize(model=model, **given)[0]
        assert engine.get_lr() == [0.1, 0.0] and engine.get_mom() == [0.9, 0.9] and engine.get_type() == ["SGD", "SGD"]
        found.append(trained(engine))
        for name, value in found[-1].items():
            assert value.equal(before[name]) == (not name.startswith("blocks")), name
    assert same(found[0], found[1]) and same(found[0], found[2])


@pytest.mark.parametrize("name", ["AdamW", "Adam", "RMSprop", "Adagrad", "NAdam"])
def test_any_elementwise_torch_optimizer(name):
    """As an object and by name, equal to itself on the plain model; DeepSpeed's names mean DeepSpeed's optimizers."""
    kind = getattr(torch.optim, name)
    by_object = make(without_optimizer(3), model := Net(), optimizer=kind(model.parameters(), lr=1e-3))
    plain = Net()
    plain.load_state_dict(weights(by_object))
    optimizer = kind(plain.parameters(), lr=1e-3)
    for step in range(2):
        plain(*batch(0, step)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for n, value in trained(by_object).items():
        torch.testing.assert_close(value, plain.state_dict()[n], rtol=1e-4, atol=1e-5)
    assert by_object.optimizer_name() == name and by_object.get_type() == [name]


@pytest.mark.parametrize(
    ("mode", "kind"), [(True, torch.optim.AdamW), (False, torch.optim.Adam), (None, torch.optim.AdamW)]
)
def test_adam_means_adamw(mode, kind):
    params = {"lr": 1e-3, "weight_decay": 0.5, **({} if mode is None else {"adam_w_mode": mode})}
    engine = make(settings(2, optimizer={"type": "Adam", "params": params}))
    torch.manual_seed(0)
    model = Net()
    other = ts.initialize(
        model=model, optimizer=kind(model.parameters(), lr=1e-3, weight_decay=0.5), config=without_optimizer()
    )[0]
    got, want = trained(engine), trained(other)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_an_object_wins_over_the_config_and_a_stranger_is_refused():
    model = Net()
    assert make(settings(1), model, optimizer=torch.optim.Adagrad(model.parameters())).optimizer_name() == "Adagrad"
    with pytest.raises(ValueError, match="not managed by ZeRO"):
        make(settings(1), optimizer=sgd(Net().parameters()))


# the schedule


def test_a_schedule_in_every_form():
    """All of them give the rates of the torch schedule; none makes torch warn of a wrong order."""
    rule = lambda step: 1 / (1 + step)  # noqa: E731
    kind = torch.optim.lr_scheduler.LambdaLR
    for form in ("object", "callable", "class"):
        model = Net()
        optimizer = sgd(model.parameters())
        if form == "object":
            given: Any = kind(optimizer, rule)
        elif form == "callable":
            given = lambda wrapped: kind(wrapped, rule)  # noqa: E731
        else:
            given = torch.optim.lr_scheduler.ConstantLR
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine = make(without_optimizer(), model, optimizer=optimizer, lr_scheduler=given)
            rates = []
            for step in range(3):
                rates += engine.get_lr()
                engine.backward(engine(*batch(0, step)))
                engine.step()
        assert isinstance(engine.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
        want = [0.1 / 3] * 3 if form == "class" else [0.1, 0.05, 0.1 / 3]
        assert rates == pytest.approx(want), form


def test_a_schedule_of_torch_beside_our_adamw_does_not_warn():
    adamw = {"type": "AdamW", "params": {"lr": 0.1}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Net()
        inner = ts.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(inner)
        trained(make(without_optimizer(), model, optimizer=inner, lr_scheduler=schedule))
        trained(make(settings(optimizer=adamw), lr_scheduler=torch.optim.lr_scheduler.ConstantLR))


@pytest.mark.parametrize(("kind", "second"), [("log", 0.1 * 0.5), ("linear", 0.1 * 0.25)])
def test_warmup_is_logarithmic_and_rises_to_the_optimizers_rate(kind, second):
    """DeepSpeed's defaults: warmup_type log, warmup_max_lr the optimizer's own rate; two steps at 0."""
    params = {"warmup_num_steps": 4, **({} if kind == "log" else {"warmup_type": kind})}
    engine = make(settings(scheduler={"type": "WarmupLR", "params": params}))
    rates = []
    for step in range(6):
        engine.backward(engine(*batch(0, step)))
        engine.step()
        rates += engine.last_step.lr
    assert rates[:3] == pytest.approx([0.0, 0.0, second]) and rates[5] == pytest.approx(0.1)


def test_clipping_by_the_optimizer_is_refused():
    with pytest.raises(ValueError, match="gradient_clipping: 1"):
        make(settings(optimizer={"type": "AdamW", "params": {"lr": 1e-3, "max_grad_norm": 1.0}}))


# data


def together(samples: list[Any]) -> Tensor:
    return torch.tensor(samples) * 10


def loaded(drop_last: bool) -> list[list[int]]:
    config = settings(0, dataloader_drop_last=drop_last)
    data: Any = range(11)
    loader: Any = ts.initialize(model=Net(), config=config, training_data=data, collate_fn=together)[2]
    return [part.tolist() for part in loader]


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_data_is_split_over_the_ranks(ranks, drop_last):
    one, two = ranks(2, loaded, drop_last)
    flat = [sample for part in one + two for sample in part]
    sizes = [len(part) for part in one]
    assert sizes == ([2, 2] if drop_last else [2, 2, 2]) and [len(part) for part in two] == sizes
    if drop_last:
        assert len(set(flat)) == 8 and set(flat) < {10 * i for i in range(11)}
    else:
        assert set(flat) == {10 * i for i in range(11)}  # one of them twice, to fill the last batch


# who takes part


class Mpu:
    """Megatron's: ranks 0, 2 share a model, and ranks 1, 3 another."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]

    def get_data_parallel_group(self) -> Any:
        return self.groups[dist.get_rank() % 2]

    def get_model_parallel_world_size(self) -> int:
        return self.parts


def two_models(stage: int) -> tuple[Any, ...]:
    mpu = Mpu(1)
    engine = make(settings(stage), lambda: Net(width=13 + dist.get_rank() % 2), mpu=mpu)
    place = dist.get_rank() // 2
    for step in range(2):
        engine.backward(engine(*batch(place, step)))
        engine.step()
    refused = ""
    try:
        make(settings(stage), mpu=Mpu(2))
    except ValueError as error:
        refused = str(error)
    return engine.world_size, engine.global_rank, engine.train_batch_size(), weights(engine), refused


def one_model(stage: int, width: int) -> dict[str, Tensor]:
    engine = make(settings(stage), lambda: Net(width=width))
    for step in range(2):
        engine.backward(engine(*batch(dist.get_rank(), step)))
        engine.step()
    return weights(engine)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_mpu_names_the_ranks_that_share_a_model(ranks, stage):
    found = ranks(4, two_models, stage)
    for rank, (world, place, size, got, refused) in enumerate(found):
        assert (world, place, size) == (2, rank // 2, 4)
        assert same(got, ranks(2, one_model, stage, 13 + rank % 2)[0])
        assert "get_model_parallel_world_size() is 2" in refused
