"""The two questions of ``deepspeed.utils.zero_to_fp32`` that are about files: Lightning's converter asks them.

It gives what it is answered to ``torch.load``, and takes two things from it: the stage, and what the caller of
``save_checkpoint`` gave to be kept. Our checkpoints have no such files: theirs are made in memory, of that layout.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import torch

from tritonspeed.checkpoint.opening import OURS, kind_of, open_source
from tritonspeed.checkpoint.stored import StoredCheckpoint
from tritonspeed.integrations.facts import EMULATED
from tritonspeed.zero.stages import stage_of

Answer = str | io.BytesIO


def get_optim_files(checkpoint_dir: str | os.PathLike[str]) -> list[Answer]:
    """The ranks' files of optimizer states; for a checkpoint of ours one in memory, which tells the stage.

    Args:
        checkpoint_dir: the folder of one checkpoint.

    Raises:
        FileNotFoundError: there are none.
    """
    folder = Path(checkpoint_dir)
    if kind_of(folder) == OURS:
        return [_in_memory({"optimizer_state_dict": {"zero_stage": _opened(folder).manifest.facts.get("stage", 0)}})]
    found = sorted(folder.glob("*_optim_states.pt"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    if not found:
        raise FileNotFoundError(f"{folder} has no *_optim_states.pt and no manifest.json: name one checkpoint's folder")
    return [str(path) for path in found]


def get_model_state_file(checkpoint_dir: str | os.PathLike[str], zero_stage: int) -> Answer:
    """The file of rank 0's model states; for a checkpoint of ours one in memory: counters, and the client's state.

    Args:
        checkpoint_dir: the folder of one checkpoint.
        zero_stage: of the run that saved it.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(checkpoint_dir)
    if kind_of(folder) == OURS:
        facts = _opened(folder).facts
        counters = {"global_steps": facts.global_steps, "global_samples": facts.global_samples}
        counters |= {"skipped_steps": facts.skipped_steps, "dp_world_size": facts.world, "mp_world_size": 1}
        return _in_memory({"module": {}, **counters, "ds_version": EMULATED, **facts.client_state})
    prefix = "zero_pp_rank_0_" if stage_of(zero_stage).shards_parameters else ""
    found = folder / f"{prefix}mp_rank_00_model_states.pt"
    if not found.exists():
        raise FileNotFoundError(f"there is no {found}: name one checkpoint's folder, and the stage it was saved at")
    return str(found)


def _opened(folder: Path) -> StoredCheckpoint:
    source = open_source(folder)
    assert isinstance(source, StoredCheckpoint), "what has our manifest is ours"
    return source


def _in_memory(content: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file
