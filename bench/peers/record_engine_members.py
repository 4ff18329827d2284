"""What DeepSpeed's engine has, for the test that `tritonspeed check --script` knows each member.

    PEER_PYTHON bench/peers/record_engine_members.py tests/cli/deepspeed_engine_members.txt

PEER_PYTHON is the interpreter of an environment with real DeepSpeed in it (bench/peers/setup.sh). Listed are public
methods, properties and attributes that a method sets; what every torch module has is left out.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import deepspeed
import torch


def main() -> None:
    """Write the list."""
    engine = deepspeed.DeepSpeedEngine
    found = set(dir(engine)) | set(re.findall(r"\bself\.(\w+)\s*(?::[^=\n]+)?=[^=]", inspect.getsource(engine)))
    found -= set(dir(torch.nn.Module))
    lines = [f"# members of the engine of DeepSpeed {deepspeed.__version__}, by bench/peers/record_engine_members.py"]
    lines += sorted(name for name in found if not name.startswith("_"))
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
