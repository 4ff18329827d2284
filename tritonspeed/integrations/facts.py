"""Values that stand under DeepSpeed's names: its version as told, a port, a build that never was. Without torch."""

from __future__ import annotations

from tritonspeed.version import __version__

EMULATED = "0.19.8"
VERSION = f"{EMULATED}+tritonspeed.{__version__}"  # a local version (PEP 440): passes every "at least"

GIT_HASH = "[none]"  # what DeepSpeed says of a tree that no setup.py has seen
GIT_BRANCH = "[none]"
MASTER_PORT = 29500
MUON = "muon"
NO_TEXT = ""
NO_OPS: dict[str, bool] = {}
NO_DEBUG = 0
