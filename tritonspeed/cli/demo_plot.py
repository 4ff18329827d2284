"""The demo's pictures, from the files that its ranks leave. Needs matplotlib (the extra ``plots``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from tritonspeed.cli.demo_progress import ranks

COLOURS = {
    "optimizer": "#3b5b92",
    "gradients": "#e08a3c",
    "parameters": "#4f9d69",
    "communication": "#b9bec7",
}  # bottom to top
INK = "#2b2f36"
SMOOTHED_SHARE = 40  # the training loss is of one small batch a step: draw its mean over a 40th of the run

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a919c",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 130,
}


def draw_loss(folder: Path, path: Path) -> None:
    """The loss over the bytes read, in training and on held-out text.

    Args:
        folder: with metrics.jsonl and summary.json.
        path: of the picture, a PNG.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    train = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out_loss" in line]
    steps, losses = [line["step"] for line in train], [line["loss"] for line in train]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        axes.plot(steps, losses, color=COLOURS["optimizer"], alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smoothed(losses), color=COLOURS["optimizer"], linewidth=1.8, label="training text")
        points = [line["step"] for line in held_out], [line["held_out_loss"] for line in held_out]
        axes.plot(*points, "o-", color=COLOURS["gradients"], linewidth=1.2, markersize=5, label="held-out text")
        for line in (held_out[0], held_out[-1]):
            axes.annotate(
                f"{line['held_out_loss']:.2f}",
                (line["step"], line["held_out_loss"]),
                xytext=(7, 7),
                textcoords="offset points",
                color="#a65f1d",
                weight="bold",
                annotation_clip=False,
            )
        axes.set(xlabel="optimizer step", ylabel="loss, nats per byte")
        axes.set_ylim(0, 1.12 * max(losses))
        axes.set_xlim(0, 1.06 * max(steps))
        axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="upper right")
        axes.set_title(
            f"{summary['num_parameters'] / 1e6:.1f} M parameters under ZeRO-{summary['stage']} on"
            f" {ranks(summary['ranks'])}, {summary['tokens_per_s']:,.0f} tokens/s",
            loc="left",
            fontsize=11,
        )
        figure.savefig(path)
        plt.close(figure)


def _smoothed(values: list[float]) -> list[float]:
    """Mean of the values around each place."""
    reach = len(values) // SMOOTHED_SHARE // 2
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw_bytes(folder: Path, path: Path) -> None:
    """Bytes of model state on one rank by category, stages 0-3, measured beside computed.

    Args:
        folder: with summary.json.
        path: of the picture, a PNG.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.6), sharey=True, layout="constrained")
        titles = {"rest_bytes": "between two steps", "peak_bytes": "at the peak of a step"}
        for axes, (when, title) in zip(panels, titles.items(), strict=True):
            _draw_stages(axes, summary["stages"], when)
            axes.set_title(title, loc="left", fontsize=11)
        panels[0].set_ylabel("MiB of model state on one rank")
        kinds = [Patch(color=colour, label=name) for name, colour in reversed(COLOURS.items())]
        kinds += [
            Patch(facecolor="#8a919c", label="measured"),
            Patch(facecolor="white", edgecolor="#8a919c", hatch="////", label="computed"),
        ]
        panels[1].legend(handles=kinds, frameon=False, loc="upper right", ncols=1, fontsize=9)
        figure.suptitle(
            f"Where the bytes are: {summary['num_parameters'] / 1e6:.1f} M parameters, {ranks(summary['ranks'])}",
            x=0.01,
            ha="left",
            fontsize=12,
            weight="bold",
        )
        figure.supxlabel(
            "measured: allocations of model state, counted · computed: by the estimate, beforehand · no activations",
            fontsize=8.5,
            color="#6b7280",
        )
        figure.savefig(path)
        plt.close(figure)


def _draw_stages(axes: Axes, stages: list[dict[str, Any]], when: str) -> None:
    width = 0.38
    for place, row in enumerate(stages):
        for side, how in ((-1, "measured"), (1, "computed")):
            x, bottom = place + side * (width / 2 + 0.015), 0.0
            for name, colour in COLOURS.items():
                height = row[when][how][name] / 2**20
                bar = axes.bar(x, height, width, bottom=bottom, linewidth=0.9, color=colour)
                if how == "computed":
                    bar[0].set(facecolor="white", edgecolor=colour, hatch="////")
                bottom += height
            axes.text(x, bottom + 1.2, f"{bottom:.1f}", ha="center", fontsize=8.5)
    axes.set_xticks(range(len(stages)), [f"stage {row['stage']}" for row in stages])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
