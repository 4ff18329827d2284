"""`deepspeed [flags] train.py ...`: the command as DeepSpeed's scripts and READMEs write it, with the same flags.

It is `tritonspeed run` under DeepSpeed's name. Where a real DeepSpeed is installed, the command is DeepSpeed's own: it
is handed over, and that is said, unless TRITONSPEED_AS_DEEPSPEED=1.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tritonspeed import cli
from tritonspeed.integrations.finder import FORCE_VARIABLE, installed_deepspeed, is_active, is_forced


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the words after `deepspeed`; None takes those of this process.

    Returns:
        The exit status, as of `tritonspeed run`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    real = installed_deepspeed()
    if real is None or is_forced() or is_active():
        return cli.main(["run", *words])
    print(f"deepspeed: DeepSpeed {real}'s own launcher ({FORCE_VARIABLE}=1 for tritonspeed's)", file=sys.stderr)
    return importlib.import_module("deepspeed.launcher.runner").main(words) or 0


if __name__ == "__main__":
    sys.exit(main())
