"""One trainer per system: the same model, AdamW, clipping at 1.0, bf16 compute with fp32 masters (or all fp32).

A trainer is a function tokens -> (loss, gradient norm before clipping), both floats, that does one whole step. Every
system is given the settings that were fastest for it here (the figures stand in bench/results/); `variant` names the
others that were tried.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Trainer = Callable[[Tensor], tuple[float, float]]

ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
CLIP = 1.0


def ddp(model: nn.Module, stage: int, precision: str, variant: str) -> Trainer:
    """DistributedDataParallel; stage 1 adds torch's ZeroRedundancyOptimizer, which needs the fp32 parameters in the
    model.

    Variants under bf16, both with fp32 masters: "masters" (bf16 model and wire, masters stepped beside it by hand)
    and "autocast" (fp32 parameters and wire under torch.autocast). torch's own bf16 compression of the wire is
    refused on gloo.
    """
    if precision == "bf16" and stage == 0 and variant in ("", "masters"):
        return _ddp_with_masters(model)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    parameters = list(model.parameters())
    if stage == 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer: Any = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, fused=True, **ADAMW)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True, **ADAMW)

    def step(tokens: Tensor) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = wrapped(tokens)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return step


def _ddp_with_masters(model: nn.Module) -> Trainer:
    """bf16 model, bf16 gradients on the wire, fp32 masters and AdamW beside it: the loop a careful user writes."""
    masters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    wrapped = nn.parallel.DistributedDataParallel(model.bfloat16(), gradient_as_bucket_view=True)
    parameters: list[Tensor] = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, fused=True, **ADAMW)

    def step(tokens: Tensor) -> tuple[float, float]:
        loss = wrapped(tokens)
        loss.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            assert parameter.grad is not None, "every parameter of the model is used"
            master.grad = parameter.grad.float()
        norm = nn.utils.clip_grad_norm_(masters, CLIP, foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        optimizer.zero_grad()
        wrapped.zero_grad()
        return loss.item(), norm.item()

    return step


def fsdp2(model: nn.Module, stage: int, precision: str, variant: str) -> Trainer:
    """torch's fully_shard, one unit per block: stage 3 reshards after forward, stage 2 keeps the parameters whole
    until backward.

    Variants under bf16: "" (gradients reduced as bf16) and "fp32-reduce".
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    low = torch.bfloat16 if precision == "bf16" else None
    reduce = torch.float32 if variant == "fp32-reduce" else low
    options: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=reduce),
        "reshard_after_forward": stage == 3,
    }
    for block in model.get_submodule("blocks").children():
        fully_shard(block, **options)
    fully_shard(model, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)

    def step(tokens: Tensor) -> tuple[float, float]:
        loss = model(tokens)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        assert isinstance(norm, DTensor), "the norm of sharded gradients is sharded too"
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.full_tensor().item()

    return step


def ds_config(stage: int, precision: str, variant: str, rows: int) -> dict[str, Any]:
    """The config that DeepSpeed and tritonspeed are both given; `variant`: comma-separated changes to it."""
    zero: dict[str, Any] = {"stage": stage}
    optimizer = dict(ADAMW)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "steps_per_print": 1_000_000,
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_optimization": zero,
    }
    for change in filter(None, variant.split(",")):
        if change == "small-buckets":
            zero.update(reduce_bucket_size=5_000_000, allgather_bucket_size=5_000_000)
        elif change == "no-overlap":
            zero["overlap_comm"] = False
        elif change == "overlap":
            zero["overlap_comm"] = True
        elif change == "torch-adam":
            optimizer["torch_adam"] = True
        elif change == "fp32-reduce":
            config["communication_data_type"] = "fp32"
        elif change == "no-persistence":
            zero["stage3_param_persistence_threshold"] = 0
        elif change == "plain-linear":
            zero["memory_efficient_linear"] = False
        elif change == "leaf-blocks":
            zero["leaf_module"] = {"classes": ["Block"]}
        else:
            raise ValueError(f"variant {change!r} is none of those that ds_config knows")
    return config


def _engine_trainer(engine: Any) -> Trainer:
    """The loop that DeepSpeed's contract prescribes."""

    def step(tokens: Tensor) -> tuple[float, float]:
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        return loss.item(), float(engine.get_global_grad_norm())

    return step


def deepspeed(model: nn.Module, stage: int, precision: str, variant: str, rows: int = 1) -> Trainer:
    """Real DeepSpeed, the optimizer its own choice (on a CPU its C++ Adam, built at first use)."""
    ds = importlib.import_module("deepspeed")  # in the peers' environment only, where no type checker looks

    engine, *_ = ds.initialize(model=model, config=ds_config(stage, precision, variant, rows), dist_init_required=False)
    return _engine_trainer(engine)


def tritonspeed(model: nn.Module, stage: int, precision: str, variant: str, rows: int = 1) -> Trainer:
    """Ours, from the same config."""
    import tritonspeed as ts

    engine, *_ = ts.initialize(model=model, config=ds_config(stage, precision, variant, rows))
    return _engine_trainer(engine)


TRAINERS: dict[str, Callable[..., Trainer]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "deepspeed": deepspeed,
    "tritonspeed": tritonspeed,
}
STAGES = {"ddp": (0, 1), "fsdp2": (2, 3), "deepspeed": (1, 2, 3), "tritonspeed": (0, 1, 2, 3)}
