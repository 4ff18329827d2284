"""The suite's pictures: speed over size for each kernel, and every row under its roof. Needs matplotlib.

What loses to a peer is drawn as an open marker, so that a picture cannot hide it.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from bench.suite import Ceilings, Row

INK, GRID, OURS = "#2b2f36", "#d9dce1", "#3b5b92"
PEERS = ("#e08a3c", "#4f9d69", "#a4508b", "#8a7f5c", "#c0504d", "#6f7f8f", "#b9a13c", "#5aa6b2")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a919c",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 130,
}


def draw_lines(rows: Sequence[Row], path: Path) -> None:
    """One panel per op and direction: percent of the measured ceiling over bytes moved, a line per variant.

    Args:
        rows: of one device and one type.
        path: of the picture, a PNG.
    """
    panels = list(dict.fromkeys((row.op, row.direction) for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows if not row.is_ours))
    colours = {name: PEERS[i % len(PEERS)] for i, name in enumerate(variants)}
    num_columns = min(4, len(panels))
    num_lines = -(-len(panels) // num_columns)
    with plt.rc_context(STYLE):
        size = 3.6 * num_columns, 2.7 * num_lines + 0.6
        figure, grid = plt.subplots(num_lines, num_columns, figsize=size, layout="constrained", squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, [row for row in rows if (row.op, row.direction) == panel], colours)
            axes.set_title(" ".join(panel), loc="left", fontsize=9)
        for axes in list(grid.flat)[len(panels) :]:
            axes.remove()
        for axes in grid[:, 0]:
            if axes.figure is not None:
                axes.set_ylabel("% of the measured ceiling")
        legends = [axes.get_legend_handles_labels() for axes in figure.axes]
        handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(path)
        plt.close(figure)


def _draw_panel(axes: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    for variant in dict.fromkeys(row.variant for row in rows):
        line = sorted((row for row in rows if row.variant == variant), key=lambda row: row.num_bytes)
        x, y = [row.num_bytes / 2**20 for row in line], [row.percent_of_ceiling for row in line]
        if line[0].is_ours:
            axes.plot(x, y, "o-", color=OURS, linewidth=2, markersize=4, label="ours", zorder=3)
        else:
            axes.plot(x, y, ".-", color=colours[variant], linewidth=1, label=variant)
    axes.axhline(100, color=GRID, linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("MiB moved")


def draw_roofline(rows: Sequence[Row], ceilings: Ceilings, path: Path) -> None:
    """Our rows, achieved FLOP/s over arithmetic intensity, under the measured roof; open markers lose to a peer.

    Args:
        rows: of one device.
        ceilings: what the copy and the matmul of the same run reached.
        path: of the picture, a PNG.
    """
    best = {}
    for row in rows:
        best[row.case] = min(row.median_us, best.get(row.case, row.median_us))
    mine = [row for row in rows if row.is_ours and row.num_flops]
    ops = list(dict.fromkeys(row.op for row in mine))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
        for i, op in enumerate(ops):
            points = [row for row in mine if row.op == op]
            colour = ([OURS, *PEERS])[i % (len(PEERS) + 1)]
            for wins, fill in ((True, colour), (False, "none")):
                chosen = [row for row in points if (row.median_us <= best[row.case]) == wins]
                axes.scatter(
                    [row.num_flops / row.num_bytes for row in chosen], [row.tflop_per_s for row in chosen],
                    s=18, facecolors=fill, edgecolors=colour, label=op if wins else None, marker="os^Dv"[i // 9 % 5],
                )  # fmt: skip
        intensities = [row.num_flops / row.num_bytes for row in mine]
        low, high = min(intensities) / 2, max([*intensities, ceilings.ridge]) * 2
        xs = [low, ceilings.ridge, high]
        axes.plot(xs, [min(ceilings.gb_per_s * x / 1e3, ceilings.tflop_per_s) for x in xs], color=INK, linewidth=1.2)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="TFLOP/s")
        axes.xaxis.set_minor_formatter(NullFormatter())  # labels of a short axis would run into each other
        axes.set_title("under the measured roof; open markers lose to a peer", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=7, ncols=2)
        figure.savefig(path)
        plt.close(figure)
