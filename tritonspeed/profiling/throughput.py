"""The line of every ``steps_per_print``: samples, tokens and operations per second.

Seconds are the clock's, between the ends of two steps: the data loader, an evaluation and a checkpoint in between are
in them. What the engine's own calls took stands beside, so that the difference is seen. The first step is left out.

Operations are the model's, recomputation not among them: counted, where ``flops_profiler`` has; else 6 for each token
and element of a matrix, 4 where it is frozen, embeddings and attention's own products left out. Of a mixture of experts
a token meets some only, so nothing is said of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tritonspeed.zero.guard import ModuleHook

log = logging.getLogger("tritonspeed")


class Throughput:
    """Watches the steps of one engine on rank 0.

    Args:
        model: what is trained; a hook counts its tokens.
        world: ranks.
    """

    def __init__(self, model: nn.Module, world: int) -> None:
        self.counted: tuple[float, float] | None = None  # (operations, samples of this rank) of one step
        self._world, self._per_token = world, flops_per_token(model)
        self._tokens: int | None = 0
        self._since: float | None = None
        self._steps = self._samples = 0
        self._engine_s = 0.0
        hook = ModuleHook(torch._dynamo.disable(self._see))
        self._handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    def close(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _see(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._tokens is not None and torch.is_grad_enabled():
            found = num_tokens(args, kwargs)
            self._tokens = None if found is None else self._tokens + found

    def end_step(self, report: Any, samples: int, due: bool) -> str | None:
        """A step has been made.

        Args:
            report: its facts.
            samples: that all ranks have seen in the run.
            due: a line is wanted.

        Returns:
            The line, which is logged too; None where none is wanted, or the first step has just been made.
        """
        now = time.perf_counter()
        line = None
        if self._since is not None:
            self._steps += 1
            self._engine_s += (report.forward_ms + report.backward_ms + report.step_ms) / 1e3
            if not due:
                return None
            line = self._line(report.step, samples - self._samples, now - self._since)
            log.info("%s", line)
        self._since, self._samples, self._steps, self._engine_s = now, samples, 0, 0.0
        self._tokens = 0 if self._tokens is not None else None
        return line

    def _line(self, step: int, samples: int, seconds: float) -> str:
        parts = [f"step {step}", f"{samples / seconds:,.2f} samples/s over {self._steps} step{'s' * (self._steps > 1)}"]
        if self._engine_s:
            parts[1] += f" ({samples / self._engine_s:,.2f} in the engine's calls)"
        if self._tokens:
            parts.append(f"{self._tokens / seconds:,.0f} tokens/s a rank")
        if self.counted is not None:
            flops, of_samples = self.counted
            rate = flops / of_samples * samples / self._world / seconds
            parts.append(f"{rate / 1e12:,.4g} TFLOP/s a rank, as counted")
        elif self._tokens and self._per_token:
            parts.append(f"{self._per_token * self._tokens / seconds / 1e12:,.4g} TFLOP/s a rank by 6·N·tokens")
        return " · ".join(parts)


def num_tokens(args: Any, kwargs: Mapping[str, Any]) -> int | None:
    """Tokens of a batch, padding included, as a model is called with it; None where it does not look like text."""
    named = args[0] if args and isinstance(args[0], Mapping) else kwargs
    if isinstance(named.get("input_ids"), Tensor):
        return named["input_ids"].numel()
    if isinstance(named.get("inputs_embeds"), Tensor):
        return named["inputs_embeds"].shape[:-1].numel()
    first = next((each for each in args if isinstance(each, Tensor)), None)
    if first is not None and first.ndim == 2 and first.dtype in (torch.int64, torch.int32):
        return first.numel()
    return None


def flops_per_token(model: nn.Module) -> int:
    """6 for each trained element of a matrix that all tokens meet, 4 for a frozen one; 0 where there are experts."""
    total, seen = 0, set()
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if p.ndim > 2 or "expert" in name:
                return 0
            if p.ndim == 2 and not isinstance(module, nn.Embedding) and id(p) not in seen:
                seen.add(id(p))
                total += p.numel() * (6 if p.requires_grad else 4)
    return total
