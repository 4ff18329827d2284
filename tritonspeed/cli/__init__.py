"""The command line: one module per command, imported only when that command is asked for.

A command `tritonspeed NAME` is the module `tritonspeed.cli.NAME` with two functions: `add_arguments(parser)` and
`run(args) -> int`, the exit status. `tritonspeed --help` lists the commands this installation has.

This layer and `comm/` are the only readers of environment variables, and this layer is the only one that prints.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence

from tritonspeed.version import __version__

COMMANDS = {
    "run": "start a training script on one or many ranks, with DeepSpeed's launcher flags, over torchrun",
    "env": "run another launcher, as torchrun or accelerate launch, so that its scripts find tritonspeed as deepspeed",
    "report": "what this machine has, what works on it, and what to do where it does not",
    "check": "what each key of a ds_config.json, and each name of deepspeed in a script, does here",
    "estimate": "what a run needs in memory and on disk, what it moves, and which settings fit",
    "tune": "time the kernels' launch configurations on this GPU and keep the fastest",
    "convert": "make one kind of checkpoint into another: tritonspeed's, DeepSpeed's universal, Hugging Face weights",
    "verify": "whether every byte of a checkpoint is what was written",
    "demo": "train a small language model under ZeRO-3 and draw where its bytes are",
}


def available_commands() -> dict[str, str]:
    """The commands whose module exists, with a line of help each, in the order of COMMANDS."""
    return {name: text for name, text in COMMANDS.items() if importlib.util.find_spec(f"{__name__}.{name}")}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser. Only the chosen command's module is imported, so that `--help` and `check` never wait for torch."""
    parser = argparse.ArgumentParser(
        prog="tritonspeed", description="Train models bigger than your GPU, in pure Python."
    )
    parser.add_argument("--version", action="version", version=f"tritonspeed {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in available_commands().items():
        # Abbreviations are off: a flag meant for the training script must not be taken for one of ours.
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == chosen:
            module = importlib.import_module(f"{__name__}.{name}")
            module.add_arguments(command)
            command.set_defaults(run_command=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `tritonspeed`; None takes those of this process.

    Returns:
        The exit status: the command's own; 2 for a mistake in what was asked, with one line that says which; 130
        after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    args = build_parser(chosen).parse_args(words)
    try:
        return args.run_command(args)
    except ValueError as error:
        # ValueError is this package's word for a user's mistake: its text already holds values and remedy.
        print(f"tritonspeed {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tritonspeed {args.command}: interrupted", file=sys.stderr)
        return 130
