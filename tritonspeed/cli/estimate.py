"""`tritonspeed estimate`: what a run needs in memory and on disk, what it moves, how long a step takes at least.

    tritonspeed estimate --model params=7e9 --config ds_config.json --gpus 8 --nodes 4 --gpu H100
    tritonspeed estimate --model meta-llama/config.json --gpus 1 --gpu 4090 --host-memory 64 --plot out.png
    tritonspeed estimate --model checkpoint/ --calibrate                 this machine, its links measured in ten seconds

Nothing is downloaded and nothing of the model is loaded. The exit status is 1 where no setting fits.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` does not wait for torch
    from tritonspeed.estimation import Forecast, Machine, Setting

DEFAULT_GPU = "H100"
DEFAULT_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {}},
    "zero_optimization": {"stage": 3},
}
UNITS = {"": 2**30, "g": 2**30, "gib": 2**30, "gb": 10**9, "t": 2**40, "tib": 2**40, "tb": 10**12, "mib": 2**20}


@dataclass(frozen=True)
class Report:
    """What is shown: the config as it stands, and the settings that were tried, best first."""

    title: str
    forecast: Forecast
    machine: Machine
    settings: list[Setting]

    @property
    def best(self) -> Setting | None:
        """The first setting that fits."""
        return next((each for each in self.settings if each.fits), None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `estimate`."""
    model = "params=7e9, a Hugging Face config.json or its folder, a folder of safetensors, or a name as llama8b"
    parser.add_argument("--model", required=True, metavar="MODEL", help=model)
    parser.add_argument("--config", metavar="FILE", help="a ds_config.json (default: bf16, AdamW, stage 3)")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of a node (default: 8; with --calibrate all here)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"which GPU, as {DEFAULT_GPU}, A100, 4090 (default: {DEFAULT_GPU})"
    )
    parser.add_argument("--device-memory", metavar="SIZE", help="of one GPU, as 80 or 80GiB")
    parser.add_argument("--host-memory", metavar="SIZE", help="of a node, as 512 or 2TiB")
    parser.add_argument("--disk", metavar="SIZE", help="of a node, to offload to, as 8TB")
    parser.add_argument("--tokens", type=int, metavar="N", help="of one GPU and step (default: 2,048 for each sample)")
    parser.add_argument("--checkpointing", action="store_true", help="blocks recompute their activations")
    parser.add_argument(
        "--calibrate", nargs="?", const=".", metavar="DIR",
        help="measure this machine's links in about ten seconds; DIR is on the disk to offload to (default: here)",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=8, metavar="N", help="settings to show (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture (needs the extra: plots)")


def run(args: argparse.Namespace) -> int:
    """Estimate and print. Returns 1 where no setting fits, else 0."""
    _check(args)
    report = _report(args)
    if args.json:
        sys.stdout.write(json.dumps(as_json(report, args.top), indent=2) + "\n")
    else:
        from tritonspeed.cli.estimate_tables import print_report

        print_report(report, args.top)
    if args.plot is not None:
        _plot(report, args.plot)
        if not args.json:
            print(f"\npicture: {args.plot}")
    return 0 if report.best is not None else 1


def _check(args: argparse.Namespace) -> None:
    for name in ("gpus", "nodes", "tokens", "top"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if args.calibrate is not None and args.gpu is not None:
        raise ValueError("--calibrate measures this machine and --gpu names another: give one of them")


def _report(args: argparse.Namespace) -> Report:
    from tritonspeed.estimation import ModelShape, estimate, search

    machine = _machine(args)
    shape = ModelShape.of(args.model)
    config = DEFAULT_CONFIG if args.config is None else args.config
    world = (args.gpus or 1) * args.nodes if machine.shares_memory else machine_gpus(args, machine) * args.nodes
    forecast = estimate(
        shape, config, world, nodes=args.nodes, tokens=args.tokens, machine=machine, checkpointing=args.checkpointing
    )
    settings = search(shape, config, world, machine, nodes=args.nodes, tokens=args.tokens)
    return Report(args.model, forecast, machine, settings)


def machine_gpus(args: argparse.Namespace, machine: Machine) -> int:
    """GPUs of a node: those asked for, else all of them, which is 8 of the usual node."""
    return args.gpus or machine.num_devices


def _machine(args: argparse.Namespace) -> Machine:
    from dataclasses import replace

    from tritonspeed.estimation import calibrate, machine_of

    found = calibrate(args.calibrate) if args.calibrate is not None else machine_of(args.gpu or DEFAULT_GPU)
    sizes = {"device_bytes": args.device_memory, "host_bytes": args.host_memory, "disk_bytes": args.disk}
    changes: dict[str, Any] = {name: parse_size(text) for name, text in sizes.items() if text is not None}
    if args.gpus is not None and args.calibrate is None:
        changes["num_devices"] = args.gpus
    return replace(found, **changes) if changes else found


def parse_size(text: str) -> int:
    """Bytes of "80", "80GiB", "2TB"; a bare number is GiB.

    Raises:
        ValueError: no number, or a unit that is not known.
    """
    number = text.strip().rstrip("".join(sorted(set("".join(UNITS) + "".join(UNITS).upper()))))
    unit = text.strip()[len(number) :].lower()
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"size {text!r}: write a number of GiB, or a unit after it: 512, 80GiB, 2TB") from None
    if size < 1:
        raise ValueError(f"size {text!r} must be more than 0")
    return size


def _plot(report: Report, path: Path) -> None:
    try:
        from tritonspeed.cli.estimate_plot import draw
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib ({error}): pip install 'tritonspeed[plots]'") from error
    try:
        draw(report, path)
    except OSError as error:
        raise ValueError(f"--plot {path} cannot be written: {error}") from error


def as_json(report: Report, top: int) -> dict[str, Any]:
    """The report as plain values: bytes, seconds, names."""
    forecast, machine, step = report.forecast, report.machine, report.forecast.step
    assert step is not None, "a report has a machine"
    return {
        "model": {
            "name": report.title,
            "parameters": forecast.num_parameters,
            "active_parameters": forecast.work.num_active,
            "assumed": forecast.shape.assumed,
        },
        "ranks": forecast.world_size,
        "nodes": forecast.work.num_nodes,
        "stage": forecast.stage,
        "machine": {k: dict(v) if hasattr(v, "items") else v for k, v in vars(machine).items()},
        "bytes_per_rank": {
            "device_at_rest": forecast.rest_bytes,
            "device_at_peak": forecast.peak_bytes,
            "activations": forecast.held_activation_bytes,
            "host_at_rest": forecast.host_rest_bytes,
            "host_at_peak": forecast.host_peak_bytes,
            "disk": forecast.disk_bytes,
        },
        "shortages": forecast.shortages(machine),
        "links": {
            link: {"bytes": num, "seconds": step.seconds_of[link]} for link, num in step.bytes_of.items()
        },
        "step": {
            "tokens": forecast.work.tokens,
            "seconds": step.seconds,
            "serial_seconds": step.serial_seconds,
            "overlapped_seconds": step.overlapped_seconds,
            "is_overlapped": step.is_overlapped,
            "binding": step.binding,
            "tokens_to_hide": step.tokens_to_hide,
        },
        "settings": [_setting_as_json(each) for each in report.settings[:top]],
    }  # fmt: skip


def _setting_as_json(each: Setting) -> dict[str, Any]:
    return {
        "stage": each.stage,
        "offload_optimizer": each.optimizer,
        "offload_param": each.parameters,
        "checkpointing": each.checkpointing,
        "seconds": each.seconds,
        "fits": each.fits,
        "shortages": list(each.shortages),
        "device_bytes": each.forecast.device_bytes,
        "host_bytes_of_node": each.forecast.node_host_bytes,
        "disk_bytes_of_node": each.forecast.node_disk_bytes,
        "config": each.block,
    }
