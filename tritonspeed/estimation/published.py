"""The memory equations of the ZeRO papers, to hold ours against; Ψ parameters, 16-bit training, Adam.

    ZeRO            (2 + 2 + 12)·Ψ bytes: parameters, gradients, and master, momentum, variance in fp32; a stage divides
                    what it shards by the ranks
    ZeRO-Infinity   20 bytes per parameter: fp32 gradients are kept too;   Ψ ≈ 12·layers·hidden²
                    checkpoints of activations   2·batch·sequence·hidden·layers / interval
                    working memory of one layer  2·hidden·4·hidden, and as much for its gradient

Ours differ where gradients are concerned: 4 bytes for the sum over the ranks, sharded from stage 1 on, in place of 2.

Source   Rajbhandari et al. 2020, arXiv:1910.02054, section 5 and table 1; Rajbhandari et al. 2021, arXiv:2104.07857,
         equations 1 to 4 and figure 2a
"""

from __future__ import annotations

from tritonspeed.zero.stages import Stage

PARAMETER_BYTES = GRADIENT_BYTES = 2
OPTIMIZER_BYTES = 12
INFINITY_BYTES = 20


def zero_bytes(num_params: float, stage: Stage, world: int) -> float:
    """Bytes of model state on one of ``world`` ranks, by ZeRO's equations (a GB there is 10⁹ bytes)."""
    return num_params * (
        PARAMETER_BYTES / (world if stage.shards_parameters else 1)
        + GRADIENT_BYTES / (world if stage.shards_gradients else 1)
        + OPTIMIZER_BYTES / (world if stage.shards_optimizer else 1)
    )


def infinity_params(layers: int, hidden: int) -> int:
    """Parameters of a transformer without embeddings: 12·layers·hidden² (equation 1)."""
    return 12 * layers * hidden**2


def infinity_state_bytes(layers: int, hidden: int) -> int:
    """Bytes of all model state over all devices: 240·layers·hidden² (equation 2; a TB there is 2⁴⁰ bytes)."""
    return INFINITY_BYTES * infinity_params(layers, hidden)


def infinity_checkpoint_bytes(layers: int, hidden: int, batch: int, sequence: int, interval: int = 1) -> int:
    """Bytes of activation checkpoints of ``batch`` samples, one every ``interval`` layers (equation 3)."""
    return 2 * batch * sequence * hidden * layers // interval


def infinity_working_bytes(hidden: int) -> int:
    """Bytes of the largest layer, hidden × 4·hidden, and of its gradient, on a device (equation 4)."""
    return 2 * PARAMETER_BYTES * hidden * 4 * hidden
