"""Muon: the orthogonalisation of a block's matrices, and the elementwise passes before and after it."""

import torch

from tritonspeed.kernels.muon import muon_direction_, muon_direction_reference, muon_step_, muon_step_reference
from tritonspeed.kernels.newton_schulz import NUM_STEPS, newton_schulz, newton_schulz_reference
from tritonspeed.tuning.case import Case, Draw, Inputs
from tritonspeed.tuning.shapes import ModelShapes


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """A square and a wide matrix of a block, and the passes over as many elements."""
    square, wide = (model.hidden, model.hidden), (model.hidden, model.ffn)
    return [_orthogonalise(*square, dtype), _orthogonalise(*wide, dtype), _passes(wide[0] * wide[1], dtype)]


def _orthogonalise(m: int, n: int, dtype: torch.dtype) -> Case:
    small, large = min(m, n), max(m, n)

    def make(device: torch.device, seed: int) -> Inputs:
        return {"x": Draw(device, seed).normal((m, n), dtype)}

    return Case(
        "newton_schulz", "forward", {"m": m, "n": n}, dtype,
        num_bytes=NUM_STEPS * dtype.itemsize * (3 * m * n + 5 * small**2),
        num_flops=NUM_STEPS * (3 * small**2 * large + small**3),
        make=make,
        run=lambda inputs: newton_schulz(inputs["x"]),
        reference=lambda inputs: newton_schulz_reference(inputs["x"]),
        num_summed=large,
    )  # fmt: skip


def _passes(n: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        return {
            "master": draw.normal((n,), torch.float32, 0.02),
            "momentum": draw.normal((n,), torch.float32, 1e-3),
            "grad": draw.normal((n,), dtype, 1e-3),
            "direction": draw.zeros((n,), dtype),
            "param_out": draw.zeros((n,), dtype) if dtype != torch.float32 else None,
        }

    def run(inputs: Inputs) -> list[torch.Tensor]:
        muon_direction_(inputs["momentum"], inputs["grad"], inputs["direction"], beta=0.95)
        muon_step_(inputs["master"], inputs["direction"], decay=1e-4, step_size=0.02, param_out=inputs["param_out"])
        return [x for name, x in inputs.items() if name != "grad" and x is not None]

    def reference(inputs: Inputs) -> list[torch.Tensor]:
        muon_direction_reference(inputs["momentum"], inputs["grad"], inputs["direction"], 0.95, True)
        muon_step_reference(inputs["master"], inputs["direction"], 1e-4, 0.02, inputs["param_out"])
        return [x for name, x in inputs.items() if name != "grad" and x is not None]

    has_copy = dtype != torch.float32
    return Case(
        "muon_", "forward", {"n": n}, dtype, num_bytes=n * (16 + dtype.itemsize * (3 + has_copy)), num_flops=10 * n,
        make=make, run=run, reference=reference,
    )  # fmt: skip
