"""A trace as a picture: what every rank did when, and the memory of rank 0 below. Needs matplotlib (``plots``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from tritonspeed.comm.spans import COMMUNICATION, MAIN, OFFLOAD, UPDATE
from tritonspeed.profiling.recorded import SERIES, Recorded, Stretch, in_rows
from tritonspeed.zero.plan import ROOT

INK, FAINT, GRID = "#2b2f36", "#8a919c", "#e4e6ea"
COLOURS = {
    "forward": "#4f83cc",
    "recompute": "#9cc0ee",
    "backward": "#e08a3c",
    "norm": "#8e6bb8",
    "update": "#4f9d69",
    "publish": "#a9d3b5",
    "gather send": "#c98a94",
    "reduce send": "#c98a94",
    "gather wait": "#c0392b",
    "reduce wait": "#c0392b",
    "update wait": "#c0392b",
    "fetch wait": "#c0392b",
    "all-gather": "#2a9d8f",
    "reduce-scatter": "#8f6a3a",
    "exchange": "#8e6bb8",
    "fetch": "#6f7fb5",
    "store": "#b58f6f",
}
MEMORY = {
    "parameters": "#4f9d69",
    "gradients": "#e08a3c",
    "optimizer": "#3b5b92",
    "communication": "#b9bec7",
    "host": "#c9a9d6",
    "disk": "#d9cdbb",
}  # bottom to top
OTHER = "#c9ced6"
ROOT_COLOURS = {"forward": "#93b6e5", "backward": "#efbf8d", "recompute": "#c3d9f5"}  # behind the other units
PHASE_COLOURS = {"forward": "#dbe7f6", "backward": "#f8e3cf", "step": "#dcefe2"}
LEGEND = {
    **{kind: COLOURS[kind] for kind in ("forward", "recompute", "backward", "norm", "update", "publish")},
    "sending": COLOURS["gather send"],
    "waiting": COLOURS["gather wait"],
    **{kind: COLOURS[kind] for kind in ("all-gather", "reduce-scatter", "fetch", "store")},
}
MAX_RANKS = 4  # drawn; the JSON has all
LANES = ((MAIN, "compute"), (UPDATE, "update"), (COMMUNICATION, "communication"), (OFFLOAD, "offload"))
HEIGHTS = {MAIN: 1.0, UPDATE: 0.5, COMMUNICATION: 0.55, OFFLOAD: 0.55}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 130,
}


def draw(ranks: Sequence[Recorded], path: Path) -> None:
    """Write the picture.

    Args:
        ranks: on one clock, whose 0 is the beginning.
        path: a PNG.
    """
    shown = list(ranks[:MAX_RANKS])
    heights = [sum(HEIGHTS[lane] for lane, _ in _lanes(each)) for each in shown]
    inches = [0.55 * height + 0.25 for height in heights]
    figure_height = 1.5 + sum(inches) + 2.3
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            *(len(shown) + 1, 1),
            sharex=True,
            figsize=(13, figure_height),
            layout="constrained",
            gridspec_kw={"height_ratios": [*inches, 2.3]},
            squeeze=False,
        )
        places = [row[0] for row in axes]
        for place, each in zip(places, shown, strict=False):
            _draw_rank(place, each, is_first=each is shown[0])
        _draw_memory(places[-1], shown[0])
        _finish(places, ranks)
        used = _used(shown)
        figure.legend(
            handles=[Patch(color=colour, label=name) for name, colour in LEGEND.items() if name in used],
            loc="outside upper right",
            ncols=12,
            frameon=False,
            handlelength=1.0,
            columnspacing=1.2,
        )
        figure.savefig(path)
        plt.close(figure)


def _lanes(each: Recorded) -> list[tuple[str, str]]:
    there = {span.lane for span in each.spans}
    return [(lane, title) for lane, title in LANES if lane in there or lane == MAIN]


def _used(ranks: Sequence[Recorded]) -> set[str]:
    found = {span.name if span.lane == COMMUNICATION else span.kind for each in ranks for span in each.spans}
    found |= {"waiting"} if any(kind.endswith("wait") for kind in found) else set()
    return found | ({"sending"} if any(kind.endswith("send") for kind in found) else set())


def _draw_rank(axes: Axes, each: Recorded, is_first: bool) -> None:
    top, ticks, titles = 0.0, [], []
    for lane, title in _lanes(each):
        height = HEIGHTS[lane]
        spans = [span for span in each.spans if span.lane == lane]
        if lane == MAIN:
            _draw_compute(axes, spans, top, height)
        else:
            rows = in_rows(spans)
            for number, row in enumerate(rows):
                share = height * 0.86 / len(rows)
                _bars(axes, row, top - height + 0.07 * height + number * share, share * 0.94)
        ticks.append(top - height / 2)
        titles.append(title)
        top -= height
    for mark in each.steps:
        axes.axvline(1e3 * mark.end, color=INK, linewidth=0.8, alpha=0.55)
        if is_first:
            middle = 1e3 * (mark.begin + mark.end) / 2
            axes.annotate(
                f"step {mark.step}", (middle, 0.04), ha="center", va="bottom", color=INK, annotation_clip=False
            )
    axes.set_ylim(top, 0.02)
    axes.set_yticks(ticks, titles)
    axes.tick_params(axis="both", length=0)
    axes.set_ylabel(f"rank {each.rank}", rotation=0, ha="right", va="center", labelpad=22, weight="bold")
    axes.spines["bottom"].set_visible(False)


def _draw_compute(axes: Axes, spans: list[Stretch], top: float, height: float) -> None:
    """Phases as a band behind, units in it, what waits and sends in front."""
    phases = [span for span in spans if span.kind == "phase"]
    for name, colour in PHASE_COLOURS.items():
        _plain(axes, [s for s in phases if s.name == name], top - 0.96 * height, 0.94 * height, colour)
    inside = [span for span in spans if span.kind != "phase"]
    for kind, colour in ROOT_COLOURS.items():
        members = [span for span in inside if span.name == ROOT and span.kind == kind]
        _plain(axes, members, top - 0.82 * height, 0.66 * height, colour)
    behind = [
        s for s in inside if not s.kind.endswith(("wait", "send")) and (s.name != ROOT or s.kind not in ROOT_COLOURS)
    ]
    _bars(axes, behind, top - 0.82 * height, 0.66 * height)
    _bars(axes, [span for span in inside if span.kind.endswith("send")], top - 0.82 * height, 0.66 * height)
    _bars(axes, [span for span in inside if span.kind.endswith("wait")], top - 0.82 * height, 0.66 * height)


def _bars(axes: Axes, spans: Sequence[Stretch], bottom: float, height: float) -> None:
    by_colour: dict[str, list[Stretch]] = {}
    for span in spans:
        key = span.name if span.lane == COMMUNICATION else span.kind
        by_colour.setdefault(COLOURS.get(key, OTHER), []).append(span)
    for colour, members in by_colour.items():
        _plain(axes, members, bottom, height, colour, edge="white")


def _plain(axes: Axes, spans: list[Stretch], bottom: float, height: float, colour: str, edge: str = "none") -> None:
    ranges = [(1e3 * span.begin, 1e3 * (span.end - span.begin)) for span in spans]
    axes.broken_barh(ranges, (bottom, height), facecolors=colour, edgecolors=edge, linewidth=0.25)


def _draw_memory(axes: Axes, each: Recorded) -> None:
    curve = list(each.curve())
    times = [1e3 * at for at, _ in curve] + [1e3 * each.end]
    owners = [name for name in SERIES if any(values[name] for _, values in curve)]
    mib = [[values[name] / 2**20 for _, values in curve] for name in owners]
    stacked = [[*row, row[-1]] for row in mib]
    if stacked:
        colours = [MEMORY[name] for name in owners]
        axes.stackplot(times, *stacked, step="post", colors=colours, labels=owners, linewidth=0)
        total = [sum(column) for column in zip(*stacked, strict=True)]
        at = max(range(len(total)), key=total.__getitem__)
        axes.plot(times, total, drawstyle="steps-post", color=INK, linewidth=0.7)
        is_late = times[at] - times[0] > 0.7 * (times[-1] - times[0])  # its words would leave the picture
        axes.annotate(
            f"{total[at]:,.1f} MiB at most",
            (times[at], total[at]),
            xytext=(-6 if is_late else 6, 4),
            textcoords="offset points",
            ha="right" if is_late else "left",
            weight="bold",
            annotation_clip=False,
        )
        axes.set_ylim(0, 1.16 * max(total))
    for at_s, _ in ((mark.end, mark) for mark in each.steps):
        axes.axvline(1e3 * at_s, color=INK, linewidth=0.8, alpha=0.55)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel(f"MiB, rank {each.rank}")
    axes.tick_params(axis="both", length=0)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        *(handles[::-1], labels[::-1]),
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        handlelength=1.0,
    )


def _finish(places: list[Axes], ranks: Sequence[Recorded]) -> None:
    places[-1].set_xlabel("milliseconds")
    places[-1].set_xlim(0, 1e3 * max(each.end for each in ranks))
    hidden = len(ranks) - MAX_RANKS
    also = f", {MAX_RANKS} of them shown" if hidden > 0 else ""
    steps = ranks[0].steps
    mean = sum(mark.end - mark.begin for mark in steps) / len(steps) if steps else 0.0
    which = f"{len(steps)} step{'s' * (len(steps) != 1)} of {1e3 * mean:,.1f} ms · " if steps else ""
    places[0].set_title(
        f"{which}{len(ranks)} rank{'s' * (len(ranks) > 1)}{also} · {ranks[0].device}", loc="left", pad=20, fontsize=11
    )
