"""The facts of one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did, on this rank.

    Attributes:
        step: optimizer steps so far, this one included, skipped ones too.
        loss: mean of this rank's micro-step losses that went through ``backward``, unscaled; None if none did.
        grad_norm: global norm of the averaged, unscaled gradient before clipping.
        lr: learning rate of each parameter group in this step.
        loss_scale: what the losses of this step were multiplied with.
        skipped: a gradient was not finite, so nothing was updated.
        skipped_reason: in words, with the first parameter it came from; said too where the step was applied all the
            same (``bf16.check_grad_overflow`` false).
        bytes_of: bytes of model state on this rank at rest: parameters, gradients, optimizer, communication.
        peak_of: the same categories when their sum was highest since the last step.
        peak_bytes: most bytes of model state and communication at any time since the last step; on a GPU the
            allocator's peak, activations included.
        host_bytes, host_peak_bytes: of offloaded state and its buffers in the host's memory, at rest and at most.
        disk_bytes: of offloaded state on disk.
        links: (bytes, seconds busy) since the last step on each link that offload uses: "disk read", "disk write".
        forward_ms, backward_ms, step_ms: host time over all micro-steps; on a GPU meaningful with
            ``wall_clock_breakdown``, which waits for the device.
    """

    step: int
    loss: float | None
    grad_norm: float
    lr: list[float]
    loss_scale: float
    skipped: bool = False
    skipped_reason: str | None = None
    bytes_of: dict[str, int] = field(default_factory=dict)
    peak_of: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    host_bytes: int = 0
    host_peak_bytes: int = 0
    disk_bytes: int = 0
    links: dict[str, tuple[int, float]] = field(default_factory=dict)
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    step_ms: float = 0.0

    def __str__(self) -> str:
        parts = [f"step {self.step}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        parts += [f"grad norm {self.grad_norm:.4g}", f"lr {self.lr[0]:.3g}" if self.lr else "no lr"]
        if self.loss_scale != 1.0:
            parts.append(f"loss scale {self.loss_scale:g}")
        parts.append(f"{self.peak_bytes / 2**20:,.0f} MiB")
        if self.host_peak_bytes:
            parts.append(f"host {self.host_peak_bytes / 2**20:,.0f} MiB")
        if self.disk_bytes:
            parts.append(f"disk {self.disk_bytes / 2**20:,.0f} MiB")
        return " · ".join(parts)

    def times(self) -> str:
        """One line of milliseconds, over all micro-steps of the step."""
        return (
            f"step {self.step} · forward {self.forward_ms:.2f} ms · backward {self.backward_ms:.2f} ms"
            f" · step {self.step_ms:.2f} ms"
        )
