"""The programs that say `deepspeed`: which are installed, whether their versions were tried, and what it means."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from tritonspeed.cli import machine
from tritonspeed.integrations import finder

TRIED: dict[str, tuple[str, str]] = {
    "transformers": ("4.51.3", "5.23.0"),
    "accelerate": ("0.34.2", "1.15.0"),
    "trl": ("0.28.0", "1.16.0"),
    "peft": ("0.15.2", "0.21.2"),
    "datasets": ("5.2.0", "5.2.0"),
    "lightning": ("2.0.9", "2.6.6"),
    "pytorch-lightning": ("1.9.5", "2.6.6"),
    "tensorboard": ("2.21.0", "2.21.0"),
}
"""Package → oldest and newest version that scripts were run with: docs/versions.md, made by bench/peers/matrix.py."""
WITHOUT_A_RANGE = {"wandb": "used where the config has a wandb block"}
"""Packages that are used, and were tried with no version."""


@dataclass(frozen=True)
class Neighbour:
    """A package that may stand beside tritonspeed.

    Attributes:
        name: of its distribution.
        version: None where it is not installed.
        fits: "tried", "not tried", "too old" or "absent".
        says: what that means for this version.
    """

    name: str
    version: str | None
    fits: str
    says: str


def neighbours() -> list[Neighbour]:
    """What is installed of them. Nothing is imported."""
    versions = machine.package_versions([*TRIED, *WITHOUT_A_RANGE])
    return [_neighbour(name, version) for name, version in versions.items()]


def _neighbour(name: str, version: str | None) -> Neighbour:
    if name in WITHOUT_A_RANGE:
        return Neighbour(name, version, "not tried" if version else "absent", WITHOUT_A_RANGE[name])
    oldest, newest = TRIED[name]
    between = oldest if oldest == newest else f"{oldest} to {newest}"
    if version is None:
        return Neighbour(name, None, "absent", f"scripts ran with {between}")
    if _number(version) < _number(oldest):
        return Neighbour(name, version, "too old", f"install {oldest} or later")
    if _number(version) > _number(newest):
        return Neighbour(name, version, "not tried", f"newer than {newest}, the last that was")
    return Neighbour(name, version, "tried", f"scripts ran with {between}")


def _number(version: str) -> tuple[int, ...]:
    """The release of a version, as numbers to compare; what follows it (rc1, .post0, +cpu) is left out."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in release[0].split(".")] if release else [0]
    return tuple(parts + [0] * (4 - len(parts)))


def meanings() -> dict[str, str]:
    """What ``import deepspeed`` gives: how a script is started → tritonspeed, a real DeepSpeed, or nothing."""
    real = finder.real_deepspeed(os.environ)
    stays = f"DeepSpeed {real}: it stays, unless {finder.FORCE_VARIABLE}=1 is set"
    plain = "tritonspeed" if finder.is_active() else f"DeepSpeed {finder.installed_deepspeed()}"
    if not finder.is_active() and finder.installed_deepspeed() is None:
        plain = "nothing: start it with `tritonspeed run`, or make `import tritonspeed.hf` its first line"
    return {"tritonspeed run script.py": stays if real else "tritonspeed", "python script.py": plain}
