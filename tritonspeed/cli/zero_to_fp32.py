"""What the script ``zero_to_fp32.py`` beside checkpoints runs: DeepSpeed's command line, for ours and theirs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from tritonspeed.checkpoint import CheckpointError
from tritonspeed.checkpoint.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict


def build_parser() -> argparse.ArgumentParser:
    """The parser, with DeepSpeed's names."""
    parser = argparse.ArgumentParser(
        prog="zero_to_fp32.py", description="Make one fp32 state dict of a checkpoint, tritonspeed's or DeepSpeed's."
    )
    parser.add_argument("checkpoint_dir", help="the folder that holds the checkpoints, or one of them")
    parser.add_argument("output_dir", help="where the state dict goes")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="of one file, as 5GB or 500MB (default: %(default)s)"
    )
    parser.add_argument(
        "--safe_serialization",
        action="store_true",
        help="write model.safetensors; without it pytorch_model.bin, which is pickle",
    )
    parser.add_argument("-t", "--tag", help="which checkpoint, as global_step100 (default: the one `latest` names)")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="leave out what is not trained")
    parser.add_argument("-d", "--debug", action="store_true", help="say more")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Convert. Returns 0, or 2 for a checkpoint that is not there or damaged, with one line that says which and why."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.INFO, format="%(message)s")
    try:
        convert_zero_checkpoint_to_fp32_state_dict(
            args.checkpoint_dir,
            args.output_dir,
            max_shard_size=args.max_shard_size,
            safe_serialization=args.safe_serialization,
            tag=args.tag,
            exclude_frozen_parameters=args.exclude_frozen_parameters,
        )
    except (ValueError, CheckpointError, OSError) as error:
        if args.debug:
            raise
        print(f"zero_to_fp32.py: {error}", file=sys.stderr)
        return 2
    return 0
