"""Steps in which things come in another order than forward, backward, step; and steps in which something goes wrong."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from cases import SHARDINGS, Case, lock_step, one_pass
from models import Net, batch
from test_cases import FusedHead, MixtureNet
from torch import Tensor
from torch.nn import functional as F

import tritonspeed as ts

# how losses become gradients


def forwards_then_backward(model: Any, rank: int, step: int) -> Tensor:
    loss = sum(model(*batch(rank, 10 * step + i)) for i in range(step + 1))  # another number in every step
    loss.backward()
    return loss.detach()


def backward_after_backward(model: Any, rank: int, step: int) -> Tensor:
    return torch.stack([one_pass(model, rank, 10 * step + i) for i in range(2)]).sum()


def two_losses(model: Any, rank: int, step: int) -> Tensor:
    """Both forwards come before both backwards."""
    losses = [model(*batch(rank, 10 * step + i)) for i in range(2)]
    for loss in losses:
        loss.backward()
    return sum(losses).detach()


def two_losses_backwards(model: Any, rank: int, step: int) -> Tensor:
    losses = [model(*batch(rank, 10 * step + i)) for i in range(2)]
    for loss in reversed(losses):
        loss.backward()
    return sum(losses).detach()


def backward_twice(model: Any, rank: int, step: int) -> Tensor:
    loss = model(*batch(rank, step))
    loss.backward(retain_graph=True)
    loss.backward()
    return loss.detach()


def without_root(model: Any, rank: int, step: int) -> Tensor:
    """Parts of the model are called one after another, the root never."""
    tokens, targets = batch(rank, step)
    x = model.embed(tokens)
    for block in model.blocks:
        x = block(x)
    loss = F.cross_entropy(model.head(model.norm(x)).flatten(0, -2), targets.flatten())
    loss.backward()
    return loss.detach()


def hidden_then_head(model: Any, rank: int, step: int) -> Tensor:
    tokens, targets = batch(rank, step)
    loss = F.cross_entropy(model.head(model.hidden(tokens)).flatten(0, -2), targets.flatten())
    loss.backward()
    return loss.detach()


def two_stages(model: Any, rank: int, step: int) -> Tensor:
    """The backward of the head first, then that of the rest from its gradient, as a pipeline or a chunked loss does."""
    tokens, targets = batch(rank, step)
    hidden = model.hidden(tokens)
    cut = hidden.detach().requires_grad_()
    loss = F.cross_entropy(model.head(cut).flatten(0, -2), targets.flatten())
    loss.backward()
    hidden.backward(cut.grad)
    return loss.detach()


def gradient_of_inputs_first(model: Any, rank: int, step: int) -> Tensor:
    """Somebody looks at a gradient through the blocks before the backward that counts."""
    tokens, targets = batch(rank, step)
    x = model.embed(tokens)
    y = model.blocks[1](model.blocks[0](x))
    (seen,) = torch.autograd.grad(y.square().mean(), x, retain_graph=True)
    loss = F.cross_entropy(model.head(y).flatten(0, -2), targets.flatten()) + (x * seen).sum()
    loss.backward()
    return loss.detach()


def eval_between(model: Any, rank: int, step: int) -> Tensor:
    loss = model(*batch(rank, step))
    model.eval()
    with torch.no_grad():
        model(*batch(rank, step + 100))
        model.blocks[1](torch.ones(1, 13))
    model.train()
    loss.backward()
    return loss.detach()


def eval_in_second_step(model: Any, rank: int, step: int) -> Tensor:
    """The first step teaches which units to keep after forward; the evaluation frees them all the same."""
    return (eval_between if step == 1 else one_pass)(model, rank, step)


def generate_between(model: Any, rank: int, step: int) -> Tensor:
    """Greedy decoding, growing tokens, inference mode, between forward and backward and after it."""
    loss = model(*batch(rank, step))
    written = generate(model, rank)
    loss.backward()
    assert torch.equal(generate(model, rank), written)
    return loss.detach()


@torch.inference_mode()
def generate(model: Any, rank: int) -> Tensor:
    tokens = batch(rank, 0)[0][:, :2]
    for _ in range(4):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert not model(tokens).isnan().any()
    return tokens


def forward_in_vain(model: Any, rank: int, step: int) -> None:
    """A forward with gradients that no backward follows."""
    model(*batch(rank, step + 50))


# what goes wrong: it happens to the sharded model alone, and leaves no trace


class Boom(Exception):
    """What the tests raise."""


class BoomInBackward(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise Boom


def raise_boom(*_: Any) -> None:
    raise Boom


def raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def hooked(model: Any, where: str, hook: Any) -> Any:
    """``hook`` on the output of module ``where``, inside of what the sharder installed."""
    handle = model.get_submodule(where).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def fail_in_forward(model: Any, rank: int, step: int, where: str = "blocks.1.up", how: Any = raise_boom) -> None:
    with hooked(model, where, how), contextlib.suppress(Boom, KeyboardInterrupt):
        one_pass(model, rank, step)
        raise AssertionError("the forward was to fail")


def fail_in_backward(model: Any, rank: int, step: int, where: str = "blocks.1.up") -> None:
    with hooked(model, where, lambda m, a, out: BoomInBackward.apply(out)), contextlib.suppress(Boom):
        one_pass(model, rank, step)
        raise AssertionError("the backward was to fail")


def fail_in_no_grad(model: Any, rank: int, step: int) -> None:
    with torch.no_grad():
        fail_in_forward(model, rank, step)


ORDERS: dict[str, Case] = {
    "several forwards, one backward": Case(drive=forwards_then_backward),
    "a backward after a backward": Case(drive=backward_after_backward),
    "two losses": Case(drive=two_losses),
    "two losses, last first": Case(drive=two_losses_backwards),
    "two losses, recomputed": Case(partial(Net, recompute="plain"), two_losses),
    "two losses, recomputed reentrantly": Case(partial(Net, recompute="reentrant"), two_losses),
    "two losses, fused head": Case(FusedHead, two_losses),
    "two losses, routed by rank": Case(MixtureNet, two_losses),
    "one graph twice": Case(drive=backward_twice),
    "without the root": Case(drive=without_root),
    "hidden, then head": Case(drive=hidden_then_head),
    "hidden, then head, tied": Case(partial(Net, tied=True), hidden_then_head),
    "hidden, then head, recomputed reentrantly": Case(partial(Net, recompute="reentrant"), hidden_then_head),
    "two stages": Case(drive=two_stages),
    "the gradient of inputs first": Case(drive=gradient_of_inputs_first),
    "eval between": Case(drive=eval_between),
    "eval between, fused head": Case(FusedHead, eval_between),
    "eval between, fused head, kept": Case(FusedHead, eval_in_second_step),
    "eval between, recomputed": Case(partial(Net, recompute="plain"), eval_between),
    "generate between": Case(drive=generate_between),
    "generate between, fused head": Case(FusedHead, generate_between),
}
FAILURES: dict[str, Case] = {
    "forward in vain": Case(disturb=forward_in_vain),
    "forward in vain, fused head": Case(FusedHead, disturb=forward_in_vain),
    "raises in forward": Case(disturb=fail_in_forward),
    "raises in forward, recomputed": Case(partial(Net, recompute="reentrant"), disturb=fail_in_forward),
    "raises after the last block": Case(disturb=partial(fail_in_forward, where="norm")),
    "raises in no_grad": Case(disturb=fail_in_no_grad),
    "interrupted in forward": Case(disturb=partial(fail_in_forward, how=raise_interrupt)),
    "raises in backward": Case(disturb=fail_in_backward),
    "raises in backward, recomputed": Case(partial(Net, recompute="plain"), disturb=fail_in_backward),
    "raises in backward, recomputed reentrantly": Case(partial(Net, recompute="reentrant"), disturb=fail_in_backward),
    "raises in backward at the head": Case(disturb=partial(fail_in_backward, where="head")),
    "raises in backward at the end": Case(disturb=partial(fail_in_backward, where="embed")),
    "raises in backward, nothing kept": Case(
        disturb=fail_in_backward, options={"limits": ts.zero.Limits(max_reuse_distance=0)}
    ),
}


def run(name: str, sharding: str) -> None:
    lock_step((ORDERS | FAILURES)[name], sharding)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", ORDERS)
def test_any_order_gives_the_same_gradients(ranks: Any, name: str, sharding: str) -> None:
    ranks(2, run, name, sharding)


@pytest.mark.parametrize("sharding", ["1", "3", "3 persistent"])
@pytest.mark.parametrize("name", FAILURES)
def test_after_a_failure_training_goes_on_as_if_it_had_not_been(ranks: Any, name: str, sharding: str) -> None:
    ranks(2, run, name, sharding)
