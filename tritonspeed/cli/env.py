"""`tritonspeed env [COMMAND ...]`: `import deepspeed` finds tritonspeed, under launchers other than `tritonspeed run`.

tritonspeed env accelerate launch --use_deepspeed train.py      one command, and all that it starts
tritonspeed env torchrun --nproc_per_node 2 train.py
eval "$(tritonspeed env)"                                       this shell, from here on
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from tritonspeed.integrations.finder import FORCE_VARIABLE, path_variables, real_deepspeed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `env`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = __doc__.split("\n\n", 1)[1] if __doc__ else None
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="what to run; without it, print shell exports"
    )


def run(args: argparse.Namespace) -> int:
    """Print the variables, or become the command.

    Raises:
        ValueError: a real DeepSpeed is there, and nobody forces this; or there is no such command.
    """
    real = real_deepspeed(os.environ)
    if real is not None:
        raise ValueError(
            f"there is a DeepSpeed {real}, and tritonspeed does not take its place in silence: set {FORCE_VARIABLE}=1,"
            " or remove it, or run the command without `tritonspeed env`"
        )
    variables = path_variables(os.environ)
    if not args.words:
        for name, value in variables.items():
            print(f"export {name}={shlex.quote(value)}")
        return 0
    program = _find(args.words[0])
    sys.stdout.flush()
    os.execve(program, [program, *args.words[1:]], {**os.environ, **variables})


def _find(command: str) -> str:
    """A command's path: on PATH, or beside this interpreter, whose environment may not be activated."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(command) or shutil.which(command, path=beside)
    if found is None:
        raise ValueError(f"there is no command {command!r}, neither on PATH nor in {beside}")
    return found
