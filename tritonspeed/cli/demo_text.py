"""The demo's text: the Python standard library's own sources, which are on every machine, or what the user names."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MOST_BYTES = 8_000_000  # several times what the demo reads in its minutes; more would only take longer to load
LEAST_BYTES = 1_000  # to train on, and held out: a few windows
HELD_OUT_EVERY = 10  # each tenth file; of fewer files than that, the last tenth of all
_NOT_SOURCES = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes never trained on, uint8 [n]; ``name`` says where they are from, ``prompt`` is what a
    sample begins with."""

    name: str
    train: Tensor
    held_out: Tensor
    prompt: bytes


def load_corpus(path: str | None) -> Corpus:
    """Read the text; the same bytes in the same order in every process.

    Args:
        path: a file or a folder; None is the standard library.

    Raises:
        ValueError: nothing there, or too little.
    """
    root = Path(path or sysconfig.get_path("stdlib"))
    if not root.exists():
        raise ValueError(f"--data {path}: there is no such file or folder in {Path.cwd()}")
    if root.is_file():
        files = [root.read_bytes()[:MOST_BYTES]]
    else:
        pattern, without = ("*.py", _NOT_SOURCES) if path is None else ("*", frozenset())
        files = list(_read_some(_shuffled(root, pattern, without)))
    if len(files) < HELD_OUT_EVERY:
        text = b"\n".join(files)
        cut = len(text) - len(text) // HELD_OUT_EVERY
        train, held_out = text[:cut], text[cut:]
    else:
        train = b"\n".join(text for i, text in enumerate(files) if (i + 1) % HELD_OUT_EVERY)
        held_out = b"\n".join(files[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    short = min(len(train), len(held_out))
    if short < LEAST_BYTES:
        raise ValueError(
            f"{root} has {len(files)} text file(s), {len(train):,} bytes to train on and {len(held_out):,} held"
            f" out, and each must be at least {LEAST_BYTES:,}: name a larger text with --data"
        )
    return Corpus(
        name="the Python standard library" if path is None else str(path),
        train=_as_tensor(train),
        held_out=_as_tensor(held_out),
        prompt=b"def " if path is None else held_out[:32],
    )


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _shuffled(root: Path, pattern: str, without: frozenset[str]) -> list[Path]:
    """Files under ``root`` that are in no folder named in ``without``, nor in a hidden one; in an order that mixes
    folders and is the same everywhere."""
    found = []
    for path in sorted(root.rglob(pattern)):
        folders = path.relative_to(root).parts[:-1]
        if not without.intersection(folders) and not any(folder.startswith(".") for folder in folders):
            found.append(path)
    random.Random(0).shuffle(found)
    return found


def _read_some(files: list[Path]) -> Iterator[bytes]:
    """The contents of text files, without what is no text, up to ``MOST_BYTES`` in all."""
    left = MOST_BYTES
    for path in files:
        if left <= 0:
            return
        try:
            text = path.read_bytes()[:left]
        except OSError:  # a folder, or a file that this user may not read
            continue
        if text and b"\0" not in text:
            left -= len(text)
            yield text


def windows(text: Tensor, starts: Tensor, num_bytes: int) -> tuple[Tensor, Tensor]:
    """Inputs and their next bytes, two int64 [len(starts), num_bytes]."""
    rows = torch.stack([text[int(start) : int(start) + num_bytes + 1] for start in starts]).long()
    return rows[:, :-1], rows[:, 1:]


def random_windows(text: Tensor, num_rows: int, num_bytes: int, seed: int) -> tuple[Tensor, Tensor]:
    """``windows`` at random places, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return windows(text, torch.randint(len(text) - num_bytes, (num_rows,), generator=generator), num_bytes)


def even_windows(text: Tensor, num_rows: int, num_bytes: int) -> tuple[Tensor, Tensor]:
    """``windows`` at even distances over the whole text."""
    return windows(text, torch.arange(num_rows) * (len(text) - num_bytes - 1) // max(1, num_rows - 1), num_bytes)
