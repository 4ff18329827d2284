"""Read and write one parameter's master, gradient or optimizer state, whole or this rank's part, at any stage.

Names and signatures are DeepSpeed's (``deepspeed.utils.safe_get_full_fp32_param`` and its kin). The *full* ones are
collective: every rank calls them, with the same parameter. The *local* ones give this rank's part of it, flat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from tritonspeed import comm
from tritonspeed.zero.bucket import Bucket, ShardState
from tritonspeed.zero.group import place_of
from tritonspeed.zero.step import ZeroOptimizer


def part_of(p: Parameter) -> tuple[Bucket, int, int, int]:
    """(bucket, lo, hi, start): p's elements [lo, hi) of the bucket that this rank's slice holds; p starts at start."""
    _, bucket, index = place_of(p)
    span = bucket.layout.spans[index]
    lo, hi = max(bucket.own[0], span.offset), min(bucket.own[1], span.end)
    return bucket, lo, max(lo, hi), span.offset


def _master(bucket: Bucket, lo: int, hi: int) -> Tensor:
    return bucket.read_master(lo, hi)


def _stepper(bucket: Bucket) -> ZeroOptimizer:
    if bucket.stepper is None:
        raise ValueError(f"'{bucket.name}' has no optimizer, so it has neither gradients nor optimizer state")
    return bucket.stepper


def _gradient(bucket: Bucket, lo: int, hi: int) -> Tensor | None:
    grad = bucket.own_grad()
    if grad is None:
        return None
    return grad[lo - bucket.own[0] : hi - bucket.own[0]].float() / _stepper(bucket).divisor


def _state(bucket: Bucket, key: str, lo: int, hi: int) -> Tensor | None:
    """None where there is no such state of these elements, empty where they are none of this rank's."""
    found = [values for values, _ in _stepper(bucket).states.views(bucket, key, lo, hi)]
    if found:
        return torch.cat(found).to(bucket.types.master)  # of whatever it is kept in
    if lo < hi:
        return None
    some = next(_stepper(bucket).states.views(bucket, key, *bucket.own), None)
    return None if some is None else torch.empty(0, dtype=bucket.types.master, device=bucket.mesh.device)


def _assemble(p: Parameter, local: Callable[[Bucket, int, int], Tensor | None]) -> Tensor | None:
    bucket, lo, hi, start = part_of(p)
    mine = local(bucket, lo, hi)
    # one more element counts the ranks that have any: those that do not, take part all the same
    whole = torch.zeros(p.numel() + 1, dtype=bucket.types.master, device=bucket.mesh.device)
    if mine is not None:
        whole[lo - start : hi - start] = mine
        whole[-1] = float(hi > lo or not p.numel())
    comm.sum_(bucket.mesh, whole, f"{bucket.name}: read")
    return whole[:-1].view(p.shape) if whole[-1] else None


def _check_shape(p: Parameter, value: Tensor) -> Tensor:
    if value.shape != p.shape:
        raise ValueError(f"a value of shape {tuple(value.shape)} cannot be set on a parameter of {tuple(p.shape)}")
    return value.detach().reshape(-1)


def safe_get_full_fp32_param(param: Parameter) -> Tensor | None:
    """The fp32 master of ``param``, whole, in its shape."""
    return _assemble(param, lambda b, lo, hi: _master(b, lo, hi).float())


@torch.no_grad()
def safe_set_full_fp32_param(param: Parameter, value: Tensor) -> None:
    """Set ``param``'s master, and what the modules see, from ``value`` (param's shape, equal on every rank)."""
    flat = _check_shape(param, value)
    _, bucket, index = place_of(param)
    span = bucket.layout.spans[index]
    if bucket.state is not ShardState.SHARDED:
        bucket.whole[span.offset : span.end].copy_(flat)
    lo, hi = max(bucket.owned[0], span.offset), min(bucket.owned[1], span.end)
    if lo < hi:
        bucket.write_master(lo, flat[lo - span.offset : hi - span.offset])
    lo, hi = max(bucket.own[0], span.offset), min(bucket.own[1], span.end)
    if lo < hi:
        bucket.write_shard(lo, flat[lo - span.offset : hi - span.offset])


def safe_get_full_grad(param: Parameter) -> Tensor | None:
    """The averaged, unscaled gradient of ``param`` since the last step, fp32, in its shape; None before a backward."""
    return _assemble(param, _gradient)


def safe_get_full_optimizer_state(param: Parameter, optim_state_key: str) -> Tensor | None:
    """The optimizer's tensor ``optim_state_key`` ("exp_avg", ...) of ``param``, whole; None before the first step.

    fp32 values, in whichever type they are kept.
    """
    return _assemble(param, lambda b, lo, hi: _state(b, optim_state_key, lo, hi))


@torch.no_grad()
def safe_set_full_optimizer_state(param: Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set the optimizer's tensor ``optim_state_key`` of ``param`` from ``value`` (param's shape, equal on every rank).

    It is rounded to the type that it is kept in; in 8 bits, so is what shares a block of 256 with it, once more.

    Raises:
        ValueError: the optimizer has no such state yet: its first step makes it.
    """
    flat = _check_shape(param, value)
    _, bucket, index = place_of(param)
    span = bucket.layout.spans[index]
    if next(_stepper(bucket).states.views(bucket, optim_state_key, *bucket.owned), None) is None:
        raise ValueError(f"the optimizer has no {optim_state_key!r} to set yet: its first step makes it")
    _stepper(bucket).states.set(bucket, optim_state_key, span.offset, flat)


@torch.no_grad()
def safe_set_full_grad(param: Parameter, value: Tensor) -> None:
    """Set the gradient that the next step applies, averaged and unscaled, from ``value`` (equal on every rank).

    Raises:
        ValueError: there is none yet: a backward makes it; at stages 0 and 1 the last one before the step.
    """
    flat = _check_shape(param, value)
    bucket, lo, hi, start = _with_gradient(param)
    _set_gradient(bucket, lo, hi, flat[lo - start : hi - start])


def safe_update_full_grad_vectorized(
    param_list: Iterable[Parameter], update_func: Callable[[Tensor, Parameter], Tensor]
) -> None:
    """``safe_set_full_grad`` of each trainable parameter to what ``update_func(gradient, parameter)`` makes of it."""
    for p in param_list:
        if p.requires_grad:
            _with_gradient(p)
            gradient = safe_get_full_grad(p)
            assert gradient is not None, "a bucket with a gradient has one of each of its parameters"
            safe_set_full_grad(p, update_func(gradient, p))


def _with_gradient(param: Parameter) -> tuple[Bucket, int, int, int]:
    bucket, lo, hi, start = part_of(param)
    if bucket.own_grad() is None:
        raise ValueError(
            f"'{bucket.name}' has no gradient to set yet: a backward makes it, at stages 0 and 1 the last one before"
            " the step"
        )
    return bucket, lo, hi, start


def _set_gradient(bucket: Bucket, lo: int, hi: int, values: Tensor) -> None:
    if lo < hi:
        bucket.write_grad(lo, values * _stepper(bucket).divisor)


def _check_part(values: Tensor, lo: int, hi: int) -> Tensor:
    if values.shape != (hi - lo,):
        raise ValueError(
            f"a value of shape {tuple(values.shape)} cannot be set on this rank's part, of {hi - lo} elements"
        )
    return values.detach()


def safe_get_local_fp32_param(param: Parameter) -> Tensor:
    """This rank's part of ``param``'s master, flat; empty where it holds none of it."""
    bucket, lo, hi, _ = part_of(param)
    return _master(bucket, lo, hi)


def safe_get_local_grad(param: Parameter) -> Tensor | None:
    """This rank's part of ``param``'s averaged, unscaled gradient, flat."""
    bucket, lo, hi, _ = part_of(param)
    return _gradient(bucket, lo, hi)


def safe_get_local_optimizer_state(param: Parameter, optim_state_key: str) -> Tensor | None:
    """This rank's part of the optimizer's tensor, flat."""
    bucket, lo, hi, _ = part_of(param)
    return _state(bucket, optim_state_key, lo, hi)


@torch.no_grad()
def safe_set_local_grad(param: Parameter, value: Tensor) -> None:
    """Set this rank's part of ``param``'s averaged, unscaled gradient from ``value``, flat.

    Raises:
        ValueError: another length; or there is no gradient yet.
    """
    bucket, lo, hi, _ = _with_gradient(param)
    _set_gradient(bucket, lo, hi, _check_part(value, lo, hi))


@torch.no_grad()
def safe_set_local_fp32_param(param: Parameter, value: Tensor) -> None:
    """Set this rank's part of ``param``'s master, and of what is gathered of it, from ``value``, flat.

    Raises:
        ValueError: another length; or the parameter is whole on every rank, so that one rank's part is not enough.
    """
    bucket, lo, hi, _ = part_of(param)
    if bucket.state is not ShardState.SHARDED:
        raise ValueError(f"'{bucket.name}' is whole on every rank: set all of it, with safe_set_full_fp32_param")
    values = _check_part(value, lo, hi)
    if lo < hi:
        bucket.write_master(lo, values)
        bucket.write_shard(lo, values)


@torch.no_grad()
def safe_set_local_optimizer_state(param: Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set this rank's part of the optimizer's tensor ``optim_state_key`` from ``value``, flat.

    Raises:
        ValueError: another length; there is no such state yet; or every rank has all of it (stage 0).
    """
    bucket, lo, hi, _ = part_of(param)
    if bucket.owned != bucket.own:
        raise ValueError(f"every rank has the whole {optim_state_key!r}: set it with safe_set_full_optimizer_state")
    values, states = _check_part(value, lo, hi), _stepper(bucket).states
    if next(states.views(bucket, optim_state_key, *bucket.owned), None) is None:
        raise ValueError(f"the optimizer has no {optim_state_key!r} to set yet: its first step makes it")
    states.set(bucket, optim_state_key, lo, values)
