"""Environment variables that every rank gets: those of the environment files, and those that travel to other hosts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

FILES = (("DS_ENV_FILE", ".deepspeed_env"), ("TRITONSPEED_ENV_FILE", ".tritonspeed_env"))
"""The variable that gives another file, and the name looked for in the home and in the working folder. Later wins."""

TRAVELLING = ("NCCL", "GLOO_", "UCX_", "MV2_", "PYTHON", "TORCH_", "TRITON_", "OMP_")
"""Beginnings of the names that are sent to other hosts. Names that hold secrets (tokens, keys) are not among them."""

_LINE = re.compile(r"(?:export\s+)?(?P<name>[A-Za-z_]\w*)=(?P<value>.*)")


def read_files(env: Mapping[str, str], home: Path, folder: Path) -> dict[str, str]:
    """The variables of `.deepspeed_env` and `.tritonspeed_env`, lines of NAME=VALUE.

    Args:
        env: the environment, for the variables that give another file.
        home: looked in first.
        folder: looked in next: what it says wins.

    Raises:
        ValueError: a file that a variable gives is not there; a line of another form.
    """
    values: dict[str, str] = {}
    for variable, name in FILES:
        given = env.get(variable)
        paths = [place / (given or name) for place in (home, folder)]  # an absolute `given` is the same in both
        found = [path for path in dict.fromkeys(paths) if path.is_file()]
        if given and not found:
            raise ValueError(f"{variable}={given}: there is no such file, neither in {home} nor in {folder}")
        for path in found:
            values.update(parse(path.read_text(), str(path)))
    return values


def parse(text: str, source: str) -> dict[str, str]:
    """Lines of NAME=VALUE, blank lines and `#` comments; quotes around a whole value are taken off."""
    values = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{source}:{number}: {line!r} is not of the form NAME=VALUE")
        value = match["value"]
        quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'"
        values[match["name"]] = value[1:-1] if quoted else value
    return values


def travelling(env: Mapping[str, str]) -> dict[str, str]:
    """The part of `env` that another host needs to behave like this one."""
    return {name: value for name, value in env.items() if name.startswith(TRAVELLING)}
