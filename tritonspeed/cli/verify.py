"""`tritonspeed verify`: whether every byte of a checkpoint is what was written.

    tritonspeed verify runs/exp1                      all checkpoints of a folder
    tritonspeed verify runs/exp1 --tag global_step500
    tritonspeed verify runs/exp1/global_step500 --sampled

The exit status is 1 where one is damaged: the file and the bytes are named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from tritonspeed.cli.convert import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `verify`."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a checkpoint, or a folder of checkpoints")
    parser.add_argument("-t", "--tag", help="which of a folder of checkpoints (default: all)")
    parser.add_argument(
        "--sampled", action="store_true", help="compare headers, sizes and one of eight digests: an eighth of the time"
    )


def run(args: argparse.Namespace) -> int:
    """Verify and say what was found. Returns 1 where a checkpoint is damaged, else 0.

    Raises:
        ValueError: there is no checkpoint of tritonspeed.
    """
    from tritonspeed.checkpoint import CheckpointError
    from tritonspeed.checkpoint.stored import verify

    is_good = True
    for path in _checkpoints(args.folder, args.tag):
        total_bytes = sum(each.stat().st_size for each in path.glob("rank-*/*.safetensors"))
        try:
            with progress(path.name) as tell:
                step = verify(path, not args.sampled, _Count(tell, total_bytes).add)
            print(f"good     {path}: step {step}, {total_bytes:,} bytes{', sampled' if args.sampled else ''}")
        except CheckpointError as error:
            is_good = False
            print(f"damaged  {path}: {error}")
    return 0 if is_good else 1


def _checkpoints(folder: Path, tag: str | None) -> list[Path]:
    """Those to verify, the newest first."""
    from tritonspeed.checkpoint.folder import committed
    from tritonspeed.checkpoint.opening import NAMES, OURS, PLAIN, kind_of, locate

    if tag is None and folder.is_dir() and kind_of(folder) is None:
        # one with a damaged manifest is found too: it is what is asked about
        found = [path for path, _ in committed(folder)]
        found += sorted(path for path in folder.iterdir() if kind_of(path) == OURS and path not in found)
        if found:
            return found
    path = locate(folder, tag)
    kind = kind_of(path) or PLAIN
    if kind != OURS:
        raise ValueError(f"{path} is {NAMES[kind]}: only tritonspeed's checkpoints have digests to compare with")
    return [path]


class _Count:
    """How much has been read of how much."""

    def __init__(self, tell: Callable[[int, int], None], total_bytes: int) -> None:
        self._tell, self._done, self._total = tell, 0, total_bytes

    def add(self, num_bytes: int) -> None:
        """So much more."""
        self._done += num_bytes
        self._tell(min(self._done, self._total), self._total)
