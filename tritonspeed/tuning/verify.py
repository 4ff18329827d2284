"""Whether a candidate computes what the heuristic's configuration does, both held against plain PyTorch.

    max|candidate − reference| ≤ 2 · max|heuristic − reference| + 2 ε · √K · max|reference|
    ‖candidate − reference‖    ≤ 2 · ‖heuristic − reference‖    + ε / 2 · √K · ‖reference‖

ε is the output's type's, K the terms of the longest sum (1 for 16-bit outputs: sums are fp32). Integers (codes of a
quantisation) may differ from the reference in at most twice as many places. A fast configuration that is wrong, through
a race or a compiler's mistake, never gets into a store.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMS = 2**26  # compared in fp64, half a GiB at a time
GROSS = 0.1  # relative; beyond it a kernel is wrong in any type


@dataclass(frozen=True)
class Distance:
    """How far an output is from its reference. Norms are over the elements that are finite in both.

    Attributes:
        largest, norm: of the difference; of integers: the share of elements that differ, twice.
        reference_largest, reference_norm: of the reference.
        num_elsewhere: elements that are finite in one and not in the other.
    """

    largest: float
    norm: float
    reference_largest: float
    reference_norm: float
    num_elsewhere: int


def distance(output: Tensor, reference: Tensor) -> Distance:
    """Compare in fp64."""
    if not output.is_floating_point():
        share = (output != reference.to(output.dtype)).double().mean().item() if output.numel() else 0.0
        return Distance(share, share, 0.0, 0.0, 0)
    largest = squares = reference_largest = reference_squares = 0.0
    num_elsewhere = 0
    for got, want in zip(output.flatten().split(CHUNK_ELEMS), reference.flatten().split(CHUNK_ELEMS), strict=True):
        got, want = got.double(), want.double()
        in_both = got.isfinite() & want.isfinite()
        num_elsewhere += int((got.isfinite() ^ want.isfinite()).sum().item())
        apart, want = (got - want)[in_both], want[in_both]
        if apart.numel():
            largest = max(largest, apart.abs().max().item())
            reference_largest = max(reference_largest, want.abs().max().item())
            squares += apart.square().sum().item()
            reference_squares += want.square().sum().item()
    return Distance(largest, math.sqrt(squares), reference_largest, math.sqrt(reference_squares), num_elsewhere)


def distances(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> list[Distance] | str:
    """Of every output, or why they cannot be compared."""
    shapes, wanted = [tuple(x.shape) for x in outputs], [tuple(x.shape) for x in references]
    if shapes != wanted:
        return f"its outputs have the shapes {shapes}, the reference's {wanted}"
    return [distance(out, reference) for out, reference in zip(outputs, references, strict=True)]


def gross_error(outputs: Sequence[Tensor], found: list[Distance] | str) -> str:
    """Why the heuristic's own outputs cannot be a yardstick; empty if they can."""
    if isinstance(found, str):
        return found
    for i, (out, d) in enumerate(zip(outputs, found, strict=True)):
        if not out.is_floating_point():
            if d.norm > GROSS:
                return f"output {i} differs from the reference in {d.norm:.1%} of its elements"
        elif d.num_elsewhere or d.norm > GROSS * max(d.reference_norm, 1e-30):
            return f"output {i} is {d.norm:.3g} off a reference of norm {d.reference_norm:.3g}"
    return ""


def disagreement(
    outputs: Sequence[Tensor], found: list[Distance] | str, heuristic: list[Distance], num_summed: int
) -> str:
    """What is wrong with a candidate's outputs; empty if they are as good as the heuristic's."""
    if isinstance(found, str):
        return found
    for i, (out, ours, known) in enumerate(zip(outputs, found, heuristic, strict=True)):
        if not out.is_floating_point():
            if ours.norm > 2 * known.norm + 1e-4:
                return f"output {i} differs from the reference in {ours.norm:.2%} of its elements, not {known.norm:.2%}"
            continue
        if ours.num_elsewhere != known.num_elsewhere:
            return f"output {i} has {ours.num_elsewhere} values that are not finite at other places"
        epsilon = torch.finfo(out.dtype).eps * (math.sqrt(num_summed) if out.dtype.itemsize >= 4 else 1)
        if not ours.largest <= 2 * known.largest + 2 * epsilon * ours.reference_largest:
            return f"output {i} is off by {ours.largest:.3g}, the heuristic's by {known.largest:.3g}"
        if not ours.norm <= 2 * known.norm + epsilon / 2 * ours.reference_norm:
            return f"output {i} is off by {ours.norm:.3g} in norm, the heuristic's by {known.norm:.3g}"
    return ""
