"""Optimizers and schedules by name: what each name means, and that nothing is dropped in silence."""

import inspect
import warnings

import pytest
import torch
from tolerances import tolerance

from tritonspeed.config.optimizers import OWN_DEFAULTS
from tritonspeed.optim import Adagrad, AdamW, Lamb, Lion, Muon
from tritonspeed.optim.build import build_optimizer, build_scheduler, check_elementwise
from tritonspeed.optim.schedules import VALID_LR_SCHEDULES, WarmupLR

ELEMENTWISE = ["SGD", "Adagrad", "Adadelta", "RMSprop", "Rprop", "NAdam", "RAdam", "Adamax", "ASGD"]
MEET = ["Lamb", "Muon"]  # ours; they need whole tensors, and the ranks meet for them
WHOLE = ["Adafactor", "LBFGS", "Muon", "SparseAdam"]


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


NUM_STEPS = 5
NEAR = tolerance(torch.float32, NUM_STEPS, magnitude=3.0)  # an update is added per step; weights are normal


def make_params(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes or (7, 13)]


def train(optimizer, params, num_steps=NUM_STEPS):
    """Steps with gradients that depend on the step and the element only, so that shards of a tensor see the same."""
    for step in range(num_steps):
        offset = 0
        for param in params:
            index = torch.arange(offset, offset + param.numel(), dtype=torch.float32)
            param.grad = torch.sin(index * 1.7 + step).reshape(param.shape)
            offset += param.numel()
        optimizer.step()
    return torch.cat([param.detach() for param in params])


@pytest.mark.parametrize(
    ("type", "params", "decoupled"),
    [
        ("Adam", {}, True),  # DeepSpeed's trap: Adam means AdamW
        ("adam", {"adam_w_mode": True}, True),
        ("Adam", {"adam_w_mode": False}, False),
        ("AdamW", {}, True),
        ("ADAMW", {"adam_w_mode": False}, True),
        ("Adam", {"torch_adam": False, "fp32_optimizer_states": True, "amsgrad": False}, True),
    ],
)
@pytest.mark.parametrize("torch_adam", [False, True])
def test_which_adam(type, params, decoupled, torch_adam):
    settings = {"lr": 0.01, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.1}
    ours, theirs = make_params(), make_params()
    built = build_optimizer(type, {**settings, **params, "torch_adam": torch_adam}, ours)
    reference_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    assert built.__class__ is (reference_class if torch_adam else AdamW)
    expected = train(reference_class(theirs, **settings), theirs)
    torch.testing.assert_close(train(built, ours), expected, **NEAR)


def test_lion_and_adagrad_by_name_are_ours():
    lion = build_optimizer("lion", {"betas": [0.95, 0.98], "set_grad_none": True}, make_params())
    assert lion.__class__ is Lion
    group = lion.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.95, 0.98), 0.0)  # DeepSpeed's lr
    settings = {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-7}
    ours, theirs = make_params(), make_params()
    adagrad = build_optimizer("ADAGRAD", {**settings, "foreach": False, "fused": None}, ours)
    assert adagrad.__class__ is Adagrad
    torch.testing.assert_close(train(adagrad, ours), train(torch.optim.Adagrad(theirs, **settings), theirs), **NEAR)


def test_the_moments_type_is_asked_for_by_name():
    assert build_optimizer("Adam", {"state": "8bit"}, make_params()).param_groups[0]["state"] == "8bit"
    with pytest.raises(ValueError, match="optimizer.params.state = '4bit' must be one of fp32, bf16, 8bit"):
        build_optimizer("AdamW", {"state": "4bit"}, make_params())
    with pytest.raises(ValueError, match="torch's Adam keeps fp32 moments"):
        build_optimizer("AdamW", {"state": "bf16", "torch_adam": True}, make_params())


def test_adam_without_params_takes_deepspeeds_defaults():
    group = build_optimizer("AdamW", None, make_params()).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 1e-8, 0.0)
    assert group["bias_correction"] is True and group["decoupled"] is True


def test_groups_keep_their_own_settings():
    first, second = make_params()
    groups = [{"params": [first], "weight_decay": 0.0}, {"params": [second], "lr": 0.5}]
    optimizer = build_optimizer("AdamW", {"lr": 0.1, "weight_decay": 0.2, "bias_correction": False}, groups)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.0), (0.5, 0.2)]
    assert all(group["bias_correction"] is False for group in optimizer.param_groups)


def test_the_config_is_not_changed():
    params = {"lr": 0.1, "torch_adam": True, "adam_w_mode": False}
    build_optimizer("Adam", params, make_params())
    assert params == {"lr": 0.1, "torch_adam": True, "adam_w_mode": False}


@pytest.mark.parametrize("params", [{"fused": True}, {"foreach": False}, {"set_grad_none": True}, {"amsgrad": False}])
def test_what_check_calls_inert_changes_nothing(params):
    optimizer = build_optimizer("AdamW", {"lr": 0.1, **params}, make_params())
    assert optimizer.__class__ is AdamW
    assert optimizer.defaults == build_optimizer("AdamW", {"lr": 0.1}, make_params()).defaults


def test_torch_adam_takes_amsgrad_and_foreach():
    optimizer = build_optimizer("Adam", {"torch_adam": True, "amsgrad": True, "foreach": False}, make_params())
    assert optimizer.param_groups[0]["amsgrad"] is True and optimizer.param_groups[0]["foreach"] is False


def test_lamb_by_name_has_deepspeeds_parameters():
    params = {"lr": 0.5, "betas": [0.8, 0.9], "max_coeff": 0.3, "min_coeff": 0.1, "eps_inside_sqrt": True}
    optimizer = build_optimizer("lamb", params, make_params())
    assert type(optimizer) is Lamb
    assert {**optimizer.param_groups[0], "betas": [*optimizer.param_groups[0]["betas"]]}.items() >= params.items()
    assert optimizer.defaults["weight_decay"] == 0 and optimizer.defaults["eps"] == 1e-8


@pytest.mark.parametrize(
    ("params", "rates"),
    [
        ({}, (0.02, 3e-4)),
        ({"lr": 0.5}, (0.5, 0.5)),
        ({"lr": 0.5, "adam_lr": 0.25}, (0.5, 0.25)),
        ({"muon_lr": 0.125, "eps": 1e-3, "ns_method": "gram"}, (0.125, 3e-4)),
    ],
)
def test_muon_by_name_has_deepspeeds_parameters(params, rates):
    hidden, vector = make_params((5, 6), (7,))
    optimizer = build_optimizer("MUON", params, [hidden, vector])
    assert type(optimizer) is Muon
    assert [(g["use_muon"], g["lr"]) for g in optimizer.param_groups] == [(True, rates[0]), (False, rates[1])]
    group = optimizer.param_groups[1]
    assert (group["weight_decay"], group["betas"], group["adam_eps"]) == (0, (0.9, 0.95), params.get("eps", 1e-10))
    assert group["eps"] == 1e-7  # of the matrices' norm, which DeepSpeed has no name for


def test_every_elementwise_class_of_torch_is_accepted():
    offered = {
        name
        for name, member in vars(torch.optim).items()
        if inspect.isclass(member) and issubclass(member, torch.optim.Optimizer) and member is not torch.optim.Optimizer
    }
    assert offered == {*ELEMENTWISE, *WHOLE, "Adam", "AdamW"}  # a new one in torch has to be sorted in


@pytest.mark.parametrize("type", [name for name in dict.fromkeys((*OWN_DEFAULTS, *ELEMENTWISE)) if name not in MEET])
def test_what_is_accepted_updates_a_shard_as_it_updates_the_whole(type):
    """The definition of elementwise. Not to the last bit: a shard ends in another vector tail, which rounds apart."""
    params = {} if type in OWN_DEFAULTS else {"foreach": False}
    whole = make_params(101)
    shards = [torch.nn.Parameter(piece.clone()) for piece in whole[0].detach().split([64, 33, 4])]
    whole_optimizer, shard_optimizer = build_optimizer(type, params, whole), build_optimizer(type, params, shards)
    check_elementwise(whole_optimizer)
    before = whole[0].detach().clone()
    after = train(whole_optimizer, whole)
    assert not torch.equal(after, before)
    torch.testing.assert_close(train(shard_optimizer, shards), after, **NEAR)


@pytest.mark.parametrize(
    ("type", "parts"),
    [
        ("OneBitAdam", ("1-bit", "Use AdamW")),
        ("OneBitLamb", ("1-bit", "Use AdamW")),
        ("ZeroOneAdam", ("0/1", "Use AdamW")),
        ("MuAdam", ("muP", "per-group learning rates")),
        ("MuAdamW", ("muP", "per-group learning rates")),
        ("MuSGD", ("muP", "Use SGD")),
        ("Adafactor", ("rows and columns", "Use AdamW")),
        ("LBFGS", ("closure", "Use AdamW")),
        ("SparseAdam", ("sparse gradients", "Use AdamW")),
    ],
)
def test_refused_by_name_with_the_reason_and_an_alternative(type, parts):
    with pytest.raises(ValueError) as caught:
        build_optimizer(type, {}, make_params())
    text = str(caught.value).lower()
    for part in (f"optimizer.type {type.lower()} ", *parts):
        assert part.lower() in text, (part, text)


@pytest.mark.parametrize(
    ("type", "params", "message"),
    [
        ("AdamW", {"max_grad_norm": 0.5}, "set gradient_clipping: 0.5"),
        ("SGD", {"max_grad_norm": 2}, "set gradient_clipping: 2"),
        ("AdamW", {"weigth_decay": 0.1}, "weigth_decay.*did you mean 'weight_decay'"),
        ("SGD", {"momentun": 0.9}, "momentun.*did you mean 'momentum'"),
        ("SGD", {"betas": [0.9, 0.99]}, "betas is not a parameter of SGD"),
        ("Adam", {"torch_adam": True, "bias_correction": False}, "always corrects"),
        ("Adam", {"torch_adam": True, "stochastic_rounding": True}, "rounds to nearest"),
        ("Adam", {"amsgrad": True}, "amsgrad.*add torch_adam: true"),
        ("AdamW", {"lr": "auto"}, 'optimizer.params.lr is "auto"'),
        ("RMSpropp", {}, "'RMSpropp' is unknown, did you mean 'RMSprop'"),
        ("Optimizer", {}, "'Optimizer' is unknown"),
        ("SGD", {"lr": "0.1"}, "lr = '0.1' must be a number"),
        ("SGD", {"lr": None}, "'SGD' refuses its params.*None"),
    ],
)
def test_mistakes_in_the_optimizer_block_are_named(type, params, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(type, params, make_params())


class Prodigy(torch.optim.SGD):
    """Stands for the class of that name elsewhere."""


class MyProdigy(Prodigy):
    pass


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adafactor(p), "Adafactor needs rows and columns"),
        (lambda p: torch.optim.LBFGS(p), "LBFGS needs a closure"),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam needs sparse gradients"),
        (lambda p: Prodigy(p), "Prodigy needs sums over the whole model"),
        (lambda p: MyProdigy(p), r"MyProdigy \(a Prodigy\) needs sums"),
        (lambda p: Wrapper(Wrapper(Prodigy(p))), "Prodigy needs sums"),
    ],
)
def test_objects_that_need_whole_tensors_are_refused(make, message):
    with pytest.raises(ValueError, match=f"{message}.*shard is a slice"):
        check_elementwise(make(make_params()))


def test_a_wrapper_that_holds_itself_ends():
    loop = Wrapper(None)
    loop.optimizer = loop
    check_elementwise(loop)


@pytest.mark.parametrize(
    ("type", "params"),
    [
        ("LRRangeTest", {}),
        ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2}),
        ("WarmupLR", {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10}),
        ("WarmupDecayLR", {"total_num_steps": 2000, "warmup_max_lr": 1e-2}),
        ("WarmupCosineLR", {"total_num_steps": 2000}),
        ("CosineAnnealingLR", {"T_max": 10}),
        ("StepLR", {"step_size": 3, "gamma": 0.5}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 10}),
    ],
)
def test_schedulers_by_name(type, params):
    scheduler = build_scheduler(type, params, build_optimizer("AdamW", {"lr": 0.1}, make_params()))
    assert scheduler.__class__.__name__ == type
    assert len(scheduler.get_last_lr()) == 1


def test_every_deepspeed_schedule_is_built_by_name():
    known = {case[0] for case in test_schedulers_by_name.pytestmark[0].args[1]}
    assert set(VALID_LR_SCHEDULES) <= known


def test_a_schedule_drives_the_optimizer_it_was_built_on():
    optimizer = build_optimizer("AdamW", {"lr": 0.5}, make_params())
    scheduler = build_scheduler("WarmupLR", None, optimizer)
    assert isinstance(scheduler, WarmupLR) and optimizer.param_groups[0]["lr"] == 0.0
    scheduler.step(2000)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_deepspeeds_silent_default_maximum_is_said():
    optimizer = build_optimizer("AdamW", {"lr": 3e-4}, make_params())
    with pytest.warns(UserWarning, match="rises to 0.001.*0.0003.*warmup_max_lr"):
        build_scheduler("WarmupDecayLR", {"total_num_steps": 5000}, optimizer)


@pytest.mark.parametrize(
    ("type", "params", "message"),
    [
        ("WarmupLr2", {}, "'WarmupLr2' is unknown, did you mean 'WarmupLR'"),
        ("LRScheduler", {}, "'LRScheduler' is unknown"),
        ("LambdaLR", {}, "initialize.lr_scheduler"),
        ("WarmupLR", {"warmup_steps": 5}, "warmup_steps.*did you mean 'warmup_num_steps'"),
        ("WarmupDecayLR", {}, "needs scheduler.params.total_num_steps"),
        ("StepLR", {}, "needs scheduler.params.step_size"),
        ("WarmupLR", {"warmup_max_lr": "auto"}, 'scheduler.params.warmup_max_lr is "auto"'),
        ("WarmupLR", {"warmup_num_steps": -2}, "warmup_num_steps is -2"),
    ],
)
def test_mistakes_in_the_scheduler_block_are_named(type, params, message):
    with pytest.raises(ValueError, match=message):
        build_scheduler(type, params, build_optimizer("SGD", {"lr": 1e-3}, make_params()))
