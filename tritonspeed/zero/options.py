"""How a model is sharded, as one value: what the config says of it, in the terms of the code below."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tritonspeed.offload import Offload
from tritonspeed.zero.order import Limits
from tritonspeed.zero.plan import LeafRules

if TYPE_CHECKING:
    from tritonspeed.config import Config
    from tritonspeed.precision import Policy


@dataclass(frozen=True)
class ShardOptions:
    """Sizes in elements; names and defaults are DeepSpeed's.

    Attributes:
        overlap: send gradients while backward goes on (``overlap_comm``).
        reduce_bucket_size: gradient elements under way at most; one bucket always may.
        sub_group_size: longest chunk of the optimizer step; 0 is no bound.
        param_persistence_threshold: parameters with fewer elements stay whole at stage 3.
        model_persistence_threshold: no more than this in all; None is no bound.
        limits: what stage 3 fetches ahead and keeps.
        leaves: modules never to split.
        wire: dtype gradients travel in; None is their own. Sums are fp32 whatever it is.
        average: divide the sum over the ranks by their number.
        check_overflow: skip a step whose gradient is not finite.
        offload: where masters, moments and parameters live while they are not in use.
        ignore_unused_parameters: a trainable parameter without a gradient counts as zero; False makes it an error.
    """

    overlap: bool = True
    reduce_bucket_size: int = 500_000_000
    sub_group_size: int = 1_000_000_000
    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int | None = None
    limits: Limits = field(default_factory=Limits)
    leaves: LeafRules = field(default_factory=LeafRules)
    wire: torch.dtype | None = None
    average: bool = True
    check_overflow: bool = True
    offload: Offload = field(default_factory=Offload)
    ignore_unused_parameters: bool = True

    @classmethod
    def from_config(cls, config: Config, policy: Policy) -> ShardOptions:
        """What a resolved config asks for."""
        zero = config.zero_optimization
        leaf = zero.leaf_module
        return cls(
            overlap=bool(zero.overlap_comm),
            reduce_bucket_size=int(zero.reduce_bucket_size),
            sub_group_size=int(zero.sub_group_size),
            param_persistence_threshold=int(zero.param_persistence_threshold),
            model_persistence_threshold=int(zero.model_persistence_threshold),
            limits=Limits(int(zero.prefetch_bucket_size), int(zero.max_live_parameters), int(zero.max_reuse_distance)),
            leaves=LeafRules(tuple(leaf.classes), tuple(leaf.names), tuple(leaf.name_suffixes)),
            wire=policy.reduce if config.communication_data_type is not None else None,
            average=config.gradient_allreduce_op == "mean",
            check_overflow=config.bf16.check_grad_overflow if config.bf16.enabled else True,
            offload=Offload.from_config(config),
            ignore_unused_parameters=zero.ignore_unused_parameters,
        )
