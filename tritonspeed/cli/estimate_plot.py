"""The picture of `tritonspeed estimate`. Needs matplotlib (the extra ``plots``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tritonspeed.cli.demo_plot import COLOURS, INK, STYLE, plt
from tritonspeed.cli.estimate_tables import name_of, spell_seconds
from tritonspeed.estimation.forecast import RUNTIME_BYTES

if TYPE_CHECKING:
    from tritonspeed.cli.estimate import Report
    from tritonspeed.estimation import Setting

KINDS = {**COLOURS, "activations": "#c9a4c7", "runtime": "#dfe2e7"}
TIERS = {"none": "#4f9d69", "cpu": "#3b5b92", "nvme": "#e08a3c"}
TIER_NAMES = {"none": "on the device", "cpu": "on the host", "nvme": "on disk"}
BINDS, OTHER, FAINT, GRID = "#c8553d", "#8fa3c4", "#8a919c", "#e4e6ea"
MAX_SETTINGS = 9
MAX_LABEL = 48


def draw(report: Report, path: Path) -> None:
    """Three panels: where the bytes are, what each link takes, which settings fit.

    Args:
        report: what is drawn.
        path: of the picture, a PNG.
    """
    settings = report.settings[:MAX_SETTINGS]
    heights = [3.5, 1.1 + 0.32 * len(settings)]
    with plt.rc_context({**STYLE, "ytick.labelsize": 9, "xtick.labelsize": 9}):
        figure = plt.figure(figsize=(11.6, sum(heights)), layout="constrained")
        rows: Any = figure.subfigures(2, 1, height_ratios=heights)
        memory, links = rows[0].subplots(1, 2, width_ratios=[1.12, 1])
        _draw_memory(memory, report)
        _draw_links(links, report)
        _draw_settings(rows[1].subplots(), report, settings)
        _title(figure, report)
        figure.savefig(path)
        plt.close(figure)


def _title(figure: Figure, report: Report) -> None:
    forecast, work = report.forecast, report.forecast.work
    devices = f"{work.ranks_per_node} × {report.machine.name}"
    nodes = devices if work.num_nodes == 1 else f"{work.num_nodes} nodes of {devices}"
    name = report.title if len(report.title) <= MAX_LABEL else "…" + report.title[-MAX_LABEL:]
    size = f"{forecast.num_parameters / 1e9:,.3g} B parameters"
    figure.suptitle(
        f"{name}: {size} on {nodes}, ZeRO stage {forecast.stage}, {work.dtype}",
        x=0.012, ha="left", fontsize=13, weight="bold",
    )  # fmt: skip
    figure.supxlabel(
        "computed beforehand: bytes by walking one iteration · seconds are bounds, every link at its full speed",
        fontsize=8.5, color=FAINT, x=0.012, ha="left",
    )  # fmt: skip


def _draw_memory(axes: Axes, report: Report) -> None:
    """One gauge per tier: what a rank needs, by kind, and its share of what there is."""
    gauges = _gauges(report)
    for row, (_, kinds, room) in enumerate(reversed(gauges)):
        need = sum(kinds.values())
        full = max(need, room)
        axes.barh(row, room / full, 0.5, color="#f4f5f7", edgecolor="#c5cad3", linewidth=0.8)
        left = 0.0
        for name, colour in KINDS.items():
            share = kinds.get(name, 0) / full
            axes.barh(row, share, 0.5, left=left, color=colour, edgecolor="white", linewidth=0.5 if share > 0.01 else 0)
            left += share
        axes.plot([room / full] * 2, [row - 0.34, row + 0.34], color=INK, linewidth=1.6)
        axes.text(
            1.02, row, f"{_gib(need)} of {_gib(room)} GiB" if need else f"0 of {_gib(room)} GiB", va="center",
            fontsize=9.5, color=INK if need <= room else BINDS, weight="normal" if need <= room else "bold",
        )  # fmt: skip
    axes.set(xlim=(0, 1.38), ylim=(-0.6, len(gauges) - 0.4), xticks=[])
    axes.set_yticks(range(len(gauges)), [tier for tier, _, _ in reversed(gauges)], fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title("What a rank holds at most, of its share", loc="left", fontsize=11)
    used = [name for name in KINDS if any(kinds.get(name) for _, kinds, _ in gauges)]
    axes.legend(
        handles=[Patch(color=KINDS[name], label=name) for name in used], frameon=False, ncols=3, fontsize=8.5,
        loc="upper left", bbox_to_anchor=(-0.02, 0.0), handlelength=1.0, columnspacing=1.4,
    )  # fmt: skip


def _gauges(report: Report) -> list[tuple[str, dict[str, int], float]]:
    """(tier, bytes by kind, a rank's share of what there is)."""
    forecast, machine = report.forecast, report.machine
    ranks = forecast.work.ranks_per_node
    device = {**forecast.peak_bytes, "activations": forecast.held_activation_bytes, "runtime": RUNTIME_BYTES}
    host, files = dict(forecast.host_peak_bytes), {"optimizer": forecast.disk_bytes}
    disk = ("disk", files, machine.disk_bytes / ranks)
    if machine.shares_memory:
        both = {name: host.get(name, 0) + device.get(name, 0) for name in KINDS}
        known = sum(both.values()) - both["runtime"]
        both["runtime"] = max(0, forecast.node_host_bytes // ranks - known)
        return [("memory", both, machine.host_bytes / ranks), disk]
    return [("device", device, machine.device_bytes), ("host", host, machine.host_bytes / ranks), disk]


def _gib(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:,.0f}" if gib >= 100 else f"{gib:,.1f}"


def _draw_links(axes: Axes, report: Report) -> None:
    """Seconds of each link in one step; the one that binds stands out."""
    step, work = report.forecast.step, report.forecast.work
    assert step is not None, "a report has a machine"
    links = list(step.seconds_of)[::-1]
    longest = max(step.seconds_of.values())
    for row, link in enumerate(links):
        seconds = step.seconds_of[link]
        colour = BINDS if link == step.binding else OTHER
        axes.barh(row, seconds, 0.62, color=colour)
        axes.text(
            seconds + 0.015 * longest, row, spell_seconds(seconds), va="center", fontsize=9,
            weight="bold" if link == step.binding else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(links)), [name_of(link) for link in links])
    axes.set_ylim(min(-0.6, len(links) - 4.6), len(links) - 0.4)
    axes.set_xlim(0, 1.2 * longest)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(_about_the_step(report), fontsize=9, x=1.0, ha="right")
    axes.set_title(f"Seconds of each link for {work.tokens:,.0f} tokens", loc="left", fontsize=11)


def _about_the_step(report: Report) -> str:
    step = report.forecast.step
    assert step is not None, "a report has a machine"
    text = f"a step takes at least {spell_seconds(step.seconds)}"
    if step.tokens_to_hide is not None:
        text += f"; from {step.tokens_to_hide:,.0f} tokens on the offload is hidden"
    return text


def _draw_settings(axes: Axes, report: Report, settings: list[Setting]) -> None:
    """The settings that were tried, fastest first; what does not fit is hollow and says why."""
    longest = max(each.seconds for each in settings)
    for row, each in enumerate(reversed(settings)):
        colour = TIERS[each.optimizer]
        bar = axes.barh(row, each.seconds, 0.64, color=colour)
        if not each.fits:
            bar[0].set(facecolor="white", edgecolor=colour, hatch="////", linewidth=0.8)
        needs = [f"device {_gib(each.forecast.device_bytes)}"] if not report.machine.shares_memory else []
        of_node = (("host", each.forecast.node_host_bytes), ("disk", each.forecast.node_disk_bytes))
        if any(num for _, num in of_node):
            needs.append("of a node: " + ", ".join(f"{name} {_gib(num)}" for name, num in of_node if num))
        note = f"{' · '.join(needs)} GiB" if each.fits else f"lacks {_in_short(each.shortages)}"
        colour = INK if each.fits else FAINT
        axes.text(
            each.seconds + 0.01 * longest, row, spell_seconds(each.seconds), va="center", fontsize=8.5, color=colour
        )
        axes.text(1.13 * longest, row, note, va="center", fontsize=8.5, color=colour)
    axes.set_yticks(range(len(settings)), [_name_of_setting(each) for each in reversed(settings)])
    for label, each in zip(axes.get_yticklabels(), reversed(settings), strict=True):
        label.set_color(INK if each.fits else FAINT)
    axes.set_ylim(-0.6, len(settings) - 0.4)
    axes.spines["bottom"].set_bounds(0, 1.1 * longest)
    axes.set_xlim(0, 1.75 * longest)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 1.1 * longest])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("seconds of a step, at least", fontsize=9, loc="left")
    num_fit = sum(each.fits for each in report.settings)
    first = "fastest" if num_fit else "nearest to fitting"
    title = f"Settings, {first} first: {num_fit} of {len(report.settings)} fit"
    axes.set_title(title, loc="left", fontsize=11)
    used = dict.fromkeys(each.optimizer for each in settings)
    handles = [Patch(color=TIERS[name], label=f"optimizer {TIER_NAMES[name]}") for name in TIERS if name in used]
    if not all(each.fits for each in settings):
        handles.append(Patch(facecolor="white", edgecolor=FAINT, hatch="////", label="does not fit"))
    axes.legend(
        handles=handles, frameon=False, fontsize=8.5, loc="upper right", bbox_to_anchor=(1.0, -0.07),
        ncols=len(handles), handlelength=1.2, borderaxespad=0.2,
    )  # fmt: skip


def _in_short(shortages: tuple[str, ...]) -> str:
    """What is lacking, without the words that the picture has no room for."""
    return (
        "; ".join(each.replace(" memory:", "").replace("disk:", "disk").replace(" GiB", "") for each in shortages)
        + " GiB"
    )


def _name_of_setting(each: Setting) -> str:
    parts = [f"stage {each.stage}"]
    if each.parameters != "none":
        parts.append(f"parameters {TIER_NAMES[each.parameters]}")
    if each.checkpointing:
        parts.append("checkpointing")
    return ", ".join(parts)
