"""The script beside checkpoints that makes one fp32 state dict of one, with DeepSpeed's name and command line."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tritonspeed.offload.durable import write_durably

SCRIPT = "zero_to_fp32.py"
_log = logging.getLogger("tritonspeed")


_TEXT = '''#!/usr/bin/env python
"""Makes one fp32 state dict of a checkpoint in this folder, for torch.load or safetensors.

    python zero_to_fp32.py . output_folder                          pytorch_model.bin
    python zero_to_fp32.py . output_folder --safe_serialization     model.safetensors
    python zero_to_fp32.py . output_folder -t global_step100        not the one that `latest` names

The checkpoints are safetensors files; docs/checkpoint-format.md of tritonspeed says what stands where in them.
"""

import sys

try:
    from tritonspeed.cli.zero_to_fp32 import main
except ImportError as error:
    sys.exit(f"zero_to_fp32.py needs tritonspeed ({error}): pip install tritonspeed")

if __name__ == "__main__":
    sys.exit(main())
'''


def put_script(folder: str | os.PathLike[str]) -> Path:
    """Put the script into a folder of checkpoints, whole or not at all; its path.

    No checkpoint depends on it: where it cannot be written, a warning says so.
    """
    path = Path(folder) / SCRIPT
    try:
        if not path.exists() or path.read_bytes() != _TEXT.encode():
            write_durably(path, _TEXT.encode())
            path.chmod(0o755)
    except OSError as error:
        _log.warning("%s could not be written: %s", path, error)
    return path
