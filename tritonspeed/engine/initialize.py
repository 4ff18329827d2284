"""``initialize``: from a model and a config to an engine, with DeepSpeed's signature and its 4-tuple."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tritonspeed import checkpointing, comm, tuning
from tritonspeed.comm import Mesh
from tritonspeed.config import Config, ModelFacts, load
from tritonspeed.engine.engine import Engine
from tritonspeed.engine.loader import TrainingLoader
from tritonspeed.log import speak
from tritonspeed.optim import build_optimizer, build_scheduler, mark_hidden_matrices
from tritonspeed.precision import LossScaler, Policy
from tritonspeed.zero import ShardedModel, ShardOptions, ZeroOptimizer

log = logging.getLogger("tritonspeed")

Initialized = tuple[Engine, ZeroOptimizer | None, DataLoader | None, Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> Initialized:
    """Make an engine, as ``deepspeed.initialize`` does.

    Args:
        args: a namespace whose ``deepspeed_config`` is the config, where ``config`` is not given.
        model: the module to train; it is sharded in place.
        optimizer: an elementwise ``torch.optim`` optimizer over the model's parameters, or a callable that makes one
            from them; None takes the config's "optimizer" block, or makes an engine without optimizer.
        model_parameters: what the config's optimizer updates, parameters or groups; None is every trainable one.
        training_data: a dataset to make a data loader of, split over the ranks.
        lr_scheduler: an object with ``step()``, or a callable that makes one from the optimizer; None takes the
            config's.
        distributed_port: MASTER_PORT where the launcher set none.
        mpu: an object with ``get_data_parallel_group()``: the ranks that share this model.
        dist_init_required: False if torch.distributed must not be started here.
        collate_fn: of the data loader.
        config: path, dict, hjson text or ``Config``; ``config_params`` is its older name.
        mesh_param: refused: there is one mesh axis.

    Returns:
        (engine, optimizer, data loader or None, scheduler or None).

    Raises:
        ValueError: the config contradicts itself, asks for what is not built, or does not fit the model.
    """
    if model is None:
        raise ValueError("initialize() needs a model: pass initialize(model=...)")
    if mesh_param is not None:
        raise ValueError("mesh_param asks for a second mesh axis, which is not built: leave it out")
    if dist_init_required is not False:
        comm.init_distributed(distributed_port=distributed_port)
    tuning.use_unless_chosen(comm.tuned_folder())
    _check_mpu(mpu)
    mesh = comm.mesh_of(mpu)
    resolved = _resolve(_find_config(args, config, config_params), model, mesh)
    policy = Policy.from_config(resolved)
    _announce(resolved, mesh)
    checkpointing.configure_from(resolved)
    inner = _build_optimizer(resolved, model, optimizer, model_parameters)
    options = ShardOptions.from_config(resolved, policy)
    stage = int(resolved.zero_optimization.stage)
    sharded = ShardedModel(model, stage, policy, options, mesh, trains=inner is not None)
    stepper = None
    if inner is not None:
        scaler = LossScaler.from_config(resolved, policy)
        stepper = sharded.attach(inner, scaler=scaler, gradient_clipping=resolved.gradient_clipping)
    schedule = _build_scheduler(resolved, lr_scheduler, stepper)
    engine = Engine(sharded, stepper, schedule, resolved, policy)
    if training_data is not None:
        micro_batch = resolved.train_micro_batch_size_per_gpu
        assert micro_batch is not None, "a resolved config has its batch sizes"
        engine.training_dataloader = TrainingLoader(
            training_data,
            micro_batch,
            mesh.world,
            mesh.rank,
            drop_last=resolved.dataloader_drop_last,
            collate_fn=collate_fn,
        )
    return engine, stepper, engine.training_dataloader, schedule


def _check_mpu(mpu: Any) -> None:
    """Ranks that hold different parts of one model would need norms and overflows over all of them."""
    for name in ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size"):
        size = getattr(mpu, name)() if hasattr(mpu, name) else 1
        if size > 1:
            raise ValueError(
                f"mpu.{name}() is {size}, but tensor and pipeline parallelism are not built: gradient norms and skipped"
                " steps would differ between the parts of the model. Use an mpu of data-parallel groups alone"
            )


def _find_config(args: Any, config: Any, config_params: Any) -> Any:
    named = [c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None]
    if not named:
        raise ValueError("initialize() needs a config: pass config=, or args with a deepspeed_config")
    if len(named) > 1 and any(c is not named[0] and c != named[0] for c in named):
        raise ValueError("initialize() was given two configs: pass one of config= and args.deepspeed_config")
    return named[0]


def _resolve(source: Any, model: nn.Module, mesh: Mesh) -> Config:
    settings = getattr(model, "config", None)
    hidden = getattr(settings, "hidden_size", None) or max(getattr(settings, "hidden_sizes", None) or [0]) or None
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = str(dtypes[0]).removeprefix("torch.") if dtypes else "float32"
    return load(source).resolve(mesh.world, ModelFacts(hidden_size=hidden, dtype=dtype))


def _build_optimizer(
    config: Config, model: nn.Module, given: Any, model_parameters: Iterable[Any] | None
) -> torch.optim.Optimizer | None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    chosen = list(model_parameters) if model_parameters is not None else []
    if chosen and isinstance(chosen[0], tuple):  # named_parameters()
        chosen = [p for _, p in chosen]
    if chosen and not isinstance(chosen[0], dict):
        chosen = [p for p in chosen if p.requires_grad]
    if isinstance(given, torch.optim.Optimizer):
        return given
    if given is not None:
        return given(chosen or trainable)
    if config.optimizer is None or config.optimizer.type is None:
        return None
    if config.optimizer.type.lower() == "muon":
        mark_hidden_matrices(model)  # by names, which the optimizer does not see
    return build_optimizer(config.optimizer.type, dict(config.optimizer.params or {}), chosen or trainable)


def _build_scheduler(config: Config, given: Any, optimizer: ZeroOptimizer | None) -> Any:
    if given is not None and (isinstance(given, type) or not hasattr(given, "step")):
        return given(optimizer) if optimizer is not None else None  # a schedule of nothing
    if given is not None:
        return given
    if config.scheduler is None or config.scheduler.type is None or optimizer is None:
        return None
    return build_scheduler(config.scheduler.type, dict(config.scheduler.params or {}), optimizer)


def _announce(config: Config, mesh: Mesh) -> None:
    """Once, on rank 0: which default of gradient clipping applies, and why."""
    if mesh.rank != 0:
        return
    speak()
    if not config.is_given("gradient_clipping"):
        log.info(
            "gradient_clipping is not in the config: %g applies (%s)",
            config.gradient_clipping,
            config.note("gradient_clipping"),
        )


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config`` to a script's own arguments, as DeepSpeed does.

    ``--local_rank``, which the launcher passes, is accepted too where the script does not say so itself.
    """
    group = parser.add_argument_group("tritonspeed")
    group.add_argument("--deepspeed", action="store_true", help="accepted; calling initialize() is what enables it")
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of the ds_config.json")
    parse = parser.parse_known_args

    def parse_known_args(*given: Any, **named: Any) -> Any:  # scripts add a --local_rank themselves, before or after
        if "--local_rank" not in parser._option_string_actions:
            group.add_argument("--local_rank", default=-1, type=int, help="set by launchers; LOCAL_RANK is what counts")
        return parse(*given, **named)

    parser.parse_known_args = parse_known_args
    return parser
