"""Cross-entropy of a vocabulary's logits, and of a hidden state with the output layer in it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonspeed.kernels.cross_entropy import cross_entropy
from tritonspeed.kernels.cross_entropy_rows import CrossEntropyOptions
from tritonspeed.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tritonspeed.tuning.case import Case, Draw, Inputs, gradients
from tritonspeed.tuning.shapes import ModelShapes

TRAINED_TOKENS = 512  # from here on a loss has a gradient: fewer are the few last tokens of an evaluation
OPTIONS = CrossEntropyOptions()


def cases(model: ModelShapes, dtype: torch.dtype) -> list[Case]:
    """Every number of tokens; gradients of the training sizes, of the largest for the output layer."""
    trained = [tokens for tokens in model.tokens if tokens >= min(TRAINED_TOKENS, max(model.tokens))]
    found = [_forward(tokens, model.vocab, dtype) for tokens in model.tokens]
    found += [_backward(tokens, model.vocab, dtype) for tokens in trained]
    return [*found, _linear(max(trained), model.hidden, model.vocab, dtype)]


def _logits(draw: Draw, tokens: int, vocab: int, dtype: torch.dtype) -> Inputs:
    return {"logits": draw.normal((tokens, vocab), dtype, 3.0), "target": draw.integers(0, vocab, (tokens,))}


def _forward(tokens: int, vocab: int, dtype: torch.dtype) -> Case:
    return Case(
        "cross_entropy", "forward", {"rows": tokens, "n": vocab}, dtype,
        num_bytes=tokens * vocab * dtype.itemsize + 20 * tokens, num_flops=5 * tokens * vocab,
        make=lambda device, seed: _logits(Draw(device, seed), tokens, vocab, dtype),
        run=lambda inputs: cross_entropy(inputs["logits"], inputs["target"]),
        reference=lambda inputs: F.cross_entropy(inputs["logits"], inputs["target"]),
        num_summed=vocab,
    )  # fmt: skip


def _backward(tokens: int, vocab: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        inputs = _logits(draw, tokens, vocab, dtype)
        saved = torch.ops.tritonspeed.cross_entropy_forward(inputs["logits"], inputs["target"], "mean", *OPTIONS)
        return inputs | {"statistics": saved[1], "scale": saved[2].view(1), "g": draw.uniform((1,), dtype, 1.0, 2.0)}

    def run(inputs: Inputs) -> Tensor:
        names = ("g", "logits", "target", "statistics", "scale")
        return torch.ops.tritonspeed.cross_entropy_backward(*(inputs[name] for name in names), *OPTIONS)

    return Case(
        "cross_entropy", "backward", {"rows": tokens, "n": vocab}, dtype,
        num_bytes=2 * tokens * vocab * dtype.itemsize + 16 * tokens, num_flops=6 * tokens * vocab,
        make=make, run=run,
        reference=lambda inputs: gradients(
            lambda logits: F.cross_entropy(logits, inputs["target"]), {"logits": inputs["logits"]}, inputs["g"].view(())
        ),
        num_summed=vocab,
    )  # fmt: skip


def _linear(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device, seed: int) -> Inputs:
        draw = Draw(device, seed)
        return {
            "hidden": draw.normal((tokens, hidden), dtype),
            "weight": draw.normal((vocab, hidden), dtype, hidden**-0.5),
            "target": draw.integers(0, vocab, (tokens,)),
            "g": draw.uniform((1,), dtype, 1.0, 2.0),
        }

    def both(inputs: Inputs, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = {name: inputs[name] for name in ("hidden", "weight")}
        return gradients(function, leaves, inputs["g"].view(()), target=inputs["target"])

    # what any implementation must move: hidden, weight and their gradients; it is the flops that bound it
    return Case(
        "linear_cross_entropy", "both", {"rows": tokens, "hidden": hidden, "n": vocab}, dtype,
        num_bytes=2 * (tokens + vocab) * hidden * dtype.itemsize, num_flops=6 * tokens * vocab * hidden,
        make=make,
        run=lambda inputs: both(inputs, linear_cross_entropy),
        reference=lambda inputs: both(inputs, linear_cross_entropy_reference),
        num_summed=vocab,
    )  # fmt: skip
