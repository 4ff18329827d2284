"""The tables of `tritonspeed estimate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from tritonspeed.estimation.forecast import RUNTIME_BYTES

if TYPE_CHECKING:
    from tritonspeed.cli.estimate import Report
    from tritonspeed.estimation import Forecast, Machine, Setting

WIDTH_OF_A_PIPE = 150
BAR = 20
NAMES = {
    "network_inside": "network, inside nodes",
    "network_between": "network, between nodes",
    "to_device": "host to device",
    "to_host": "device to host",
    "device_memory": "device memory, optimizer",
    "host_memory": "host memory",
    "disk_read": "disk, read",
    "disk_write": "disk, write",
}


def print_report(report: Report, top: int) -> None:
    """All tables, to standard output."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE, highlight=False)
    console.print(_head(report))
    console.print(_memory(report.forecast, report.machine))
    console.print(_links(report.forecast, report.machine))
    console.print(_verdict(report.forecast, report.machine))
    if report.machine.how:
        console.print(_measured(report.machine))
    console.print(_ranking(report.settings, report.machine, top))
    best = report.best
    if best is None:
        console.print(Text("nothing fits: more memory, more disk, more ranks, or a smaller model", style="bold red"))
        return
    hint = " · with activation checkpointing in the model's blocks" if best.checkpointing else ""
    text = Syntax(best.text, "json", background_color="default")
    console.print(Panel(text, title=f"into the ds_config.json, for the first{hint}", title_align="left", width=100))


def name_of(link: str) -> str:
    """A link's name for people."""
    return NAMES.get(link, link)


def spell_bytes(num: float) -> str:
    """Bytes in GiB or MiB."""
    if not num:
        return "-"
    return f"{num / 2**30:,.2f} GiB" if num >= 2**28 else f"{num / 2**20:,.1f} MiB"


def _spell_speed(bytes_per_s: float) -> str:
    speed = bytes_per_s / 1e9
    return f"{speed:,.0f} GB/s" if speed >= 100 else f"{speed:.3g} GB/s"


def spell_seconds(seconds: float) -> str:
    """Seconds with three digits, in ms below one."""
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _head(report: Report) -> Text:
    forecast, machine = report.forecast, report.machine
    work, shape = forecast.work, forecast.shape
    active = f" ({work.num_active / 1e9:.3g} B per token)" if work.num_active < work.num_params else ""
    nodes = f"{work.num_nodes} node{'s' if work.num_nodes > 1 else ''} × {work.ranks_per_node} {machine.name}"
    text = Text.assemble(
        (f"{report.title}: {forecast.num_parameters / 1e9:,.3g} B parameters{active}", "bold"),
        f" · {work.dtype} · ZeRO stage {forecast.stage} on {nodes} · {work.tokens:,.0f} tokens per rank and step",
    )
    return text.append(f"\nassumed: {shape.assumed}", style="dim") if shape.assumed else text


def _memory(forecast: Forecast, machine: Machine) -> Table:
    table = Table(title="Bytes of one rank", title_justify="left", title_style="bold")
    table.add_column("")
    places = ("device, between steps", "device, at the peak", "host, at the peak", "disk")
    if machine.shares_memory:  # one memory, and what is offloaded within it has a column of its own
        places = ("in use, between steps", "in use, at the peak", "offloaded, at the peak", "disk")
    for name in places:
        table.add_column(name, justify="right")
    for name in forecast.peak_bytes:
        values = (forecast.rest_bytes, forecast.peak_bytes, forecast.host_peak_bytes)
        table.add_row(name, *(spell_bytes(each.get(name, 0)) for each in values), "-")
    if forecast.disk_bytes:
        table.add_row("files, both slots", "-", "-", "-", spell_bytes(forecast.disk_bytes))
    if forecast.held_activation_bytes:
        guess = "" if forecast.activation_bytes is not None else " (about)"
        table.add_row(f"activations{guess}", "-", spell_bytes(forecast.held_activation_bytes), "-", "-")
    for name, values, style in _totals(forecast, machine):
        table.add_row(name, *(spell_bytes(n) for n in values), style=style)
    if shortages := forecast.shortages(machine):
        table.caption, table.caption_style = f"does not fit: {'; '.join(shortages)}", "bold red"
        table.caption_justify = "left"
    return table


def _totals(forecast: Forecast, machine: Machine) -> list[tuple[str, tuple[float, ...], str]]:
    """(name, bytes by column, style) of the last rows."""
    ranks, disk = forecast.work.ranks_per_node, forecast.disk_bytes
    share = machine.host_bytes / ranks, machine.disk_bytes / ranks
    there = "there is, for each rank"
    if machine.shares_memory:
        bound = forecast.node_host_bytes / ranks
        return [("a process, at most", (0, bound, 0, disk), "bold"), (there, (0, share[0], 0, share[1]), "dim")]
    rest = sum(forecast.rest_bytes.values()) + RUNTIME_BYTES
    return [
        ("runtime (about)", (RUNTIME_BYTES, RUNTIME_BYTES, 0, 0), ""),
        ("all", (rest, forecast.device_bytes, forecast.total_host_peak_bytes, disk), "bold"),
        (there, (machine.device_bytes, machine.device_bytes, *share), "dim"),
    ]


def _links(forecast: Forecast, machine: Machine) -> Table:
    step, work = forecast.step, forecast.work
    assert step is not None, "a report has a machine"
    table = Table(title="One step, one rank: what each link carries", title_justify="left", title_style="bold")
    table.add_column("link")
    for name in ("amount", "at", "takes at least"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    longest = max(step.seconds_of.values())
    for link, amount in step.bytes_of.items():
        seconds = step.seconds_of[link]
        speed = amount / seconds
        shown = spell_bytes(amount), _spell_speed(speed)
        if link == "compute":
            shown = f"{amount / 1e12:,.1f} TFLOP", f"{speed / 1e12:,.4g} TFLOP/s"
        bar = "█" * max(1, round(BAR * seconds / longest))
        is_binding = link == step.binding
        table.add_row(
            name_of(link), *shown, spell_seconds(seconds), Text(bar + (" binds" if is_binding else "")),
            style="bold yellow" if is_binding else "",
        )  # fmt: skip
    ranks = work.ranks_per_node
    if ranks > 1:
        table.caption = f"host memory, disk and network between nodes are shared by {ranks} ranks"
        table.caption_justify = "left"
    return table


def _verdict(forecast: Forecast, machine: Machine) -> Group:
    step, work = forecast.step, forecast.work
    assert step is not None, "a report has a machine"
    phases = " · ".join(f"{name} {spell_seconds(s)}" for name, s in step.phase_seconds.items())
    per_s = work.tokens * work.world / step.seconds
    how = "the optimizer under the next forward" if step.is_overlapped else "one after another"
    lines = [
        Text.assemble("a step takes at least ", (spell_seconds(step.seconds), "bold"), f" ({phases}; {how})"),
        Text.assemble(
            f"at most {per_s:,.0f} tokens per second on all ranks; ", (name_of(step.binding), "bold"), " binds"
        ),
    ]
    if step.tokens_to_hide is not None:
        hidden = work.tokens >= step.tokens_to_hide
        enough = (f"{step.tokens_to_hide:,.0f} tokens", "bold")
        so = "it is" if hidden else f"it is not, with {work.tokens:,.0f}"
        lines.append(Text.assemble("offload is hidden from ", enough, f" per rank and step on (T*): {so}"))
    elif work.offloaded:
        lines.append(Text("offload is not hidden: the optimizer runs under the next forward only at stage 3"))
    seconds = work.ranks_per_node * forecast.snapshot_bytes / machine.disk_write_bytes_per_s
    lines.append(
        Text.assemble(
            f"a checkpoint is {spell_bytes(forecast.checkpoint_bytes)}: at least ",
            (spell_seconds(seconds), "bold"),
            f" to the nodes' disks; in the background, {spell_bytes(forecast.snapshot_bytes)} of host memory a rank",
        )
    )
    return Group(*lines, Text(""))


def _measured(machine: Machine) -> Table:
    table = Table(title=f"Measured: {machine.name}", title_justify="left", title_style="bold")
    table.add_column("figure")
    table.add_column("", justify="right")
    table.add_column("how")
    for name, how in machine.how.items():
        value = getattr(machine, name)
        if name == "flops_per_s":
            shown = ", ".join(f"{dtype} {v / 1e12:.3g}" for dtype, v in value.items()) + " TFLOP/s"
        elif name.endswith("_per_s"):
            shown = _spell_speed(value)
        elif name.endswith("_bytes"):
            shown = spell_bytes(value)
        else:
            shown = f"{value:.0%}" if name == "efficiency" else str(value).lower()
        table.add_row(name.removesuffix("_bytes_per_s").removesuffix("_per_s").replace("_", " "), shown, how)
    return table


def _ranking(settings: list[Setting], machine: Machine, top: int) -> Table:
    table = Table(
        title="Settings, by the least time of a step for the same tokens", title_justify="left", title_style="bold"
    )
    for name in ("", "stage", "optimizer", "parameters", "checkpointing", "batch"):
        table.add_column(name)
    for name in ("step", "device", "host of a node", "disk of a node"):
        table.add_column(name, justify="right")
    table.add_column("binds, or lacks")
    for number, each in enumerate(settings[:top], 1):
        forecast, step = each.forecast, each.forecast.step
        assert step is not None, "a search has a machine"
        table.add_row(
            str(number) if each.fits else "✗",
            str(each.stage),
            _tier(each.optimizer),
            _tier(each.parameters),
            "yes" if each.checkpointing else "no",
            f"{each.micro_batch} × {each.accumulation}",
            spell_seconds(each.seconds),
            "-" if machine.shares_memory else spell_bytes(forecast.device_bytes),
            spell_bytes(forecast.node_host_bytes),
            spell_bytes(forecast.node_disk_bytes),
            name_of(step.binding) if each.fits else "; ".join(each.shortages),
            style="" if each.fits else "dim",
        )
    num_fit = sum(each.fits for each in settings)
    table.caption = f"{num_fit} of {len(settings)} fit; batch: samples of a forward × forwards of a step"
    table.caption_justify = "left"
    return table


def _tier(name: str) -> str:
    return {"none": "device", "cpu": "host", "nvme": "disk"}[name]
