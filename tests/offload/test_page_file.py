"""The format: any reader of safetensors opens the files, and everything stands where direct I/O wants it."""

from __future__ import annotations

import errno
import json
import os
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tritonspeed.offload.memory import PAGE_BYTES
from tritonspeed.offload.page_file import DTYPES, FILLER, PageFile, Piece, create, header_bytes, read_header

SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def files(draw: st.DrawFn) -> PageFile:
    """Parameters and parts of them, with and without gaps, down to nothing."""
    pieces, end = [], 0
    for i, shape in enumerate(draw(st.lists(SHAPES, max_size=6))):
        start = end + draw(st.integers(0, 3)) * draw(st.sampled_from((1, 64, 1000)))
        piece = Piece.of(draw(st.sampled_from(("w", 'a"b\\', "größe", "x.[0:1]"))) + str(i), shape, start)
        if piece.numel > 2 and draw(st.booleans()):
            lo = draw(st.integers(1, piece.numel - 1))
            piece = Piece.of(piece.name, shape, start, lo, draw(st.integers(lo, piece.numel)))
        pieces.append(piece)
        end = piece.start + piece.numel
    numel = end + draw(st.sampled_from((0, 1, 1023, 4096)))
    return PageFile(
        "layers/0", "master", draw(st.sampled_from(list(DTYPES))), numel, tuple(pieces), rank=3, world=2**20
    )


@settings(max_examples=150, deadline=None)
@given(file=files())
def test_any_layout_is_opened_by_any_reader(tmp_path_factory, file):
    path = tmp_path_factory.mktemp("files") / "flat.safetensors"
    begin = create(path, file)
    flat = torch.arange(file.numel).remainder(200).to(file.dtype)
    with open(path, "r+b") as stream:
        stream.seek(begin)
        stream.write(flat.view(torch.uint8).numpy().tobytes() if file.numel else b"")

    assert begin % PAGE_BYTES == 0 and os.path.getsize(path) % PAGE_BYTES == 0
    assert read_header(path) == (file, begin)
    loaded = load_file(path)
    named = {name: tensor for name, tensor in loaded.items() if not name.startswith(FILLER)}
    assert set(named) == {piece.name for piece in file.pieces}
    for piece in file.pieces:
        assert named[piece.name].dtype == file.dtype
        assert torch.equal(named[piece.name], flat[piece.start : piece.start + piece.numel].view(piece.shape))
    assert sum(tensor.nbytes for tensor in loaded.values()) == file.data_bytes
    with safe_open(path, "pt") as opened:
        facts = opened.metadata()
    assert (facts["bucket"], facts["kind"], facts["rank"], facts["world"]) == ("layers/0", "master", "3", str(2**20))


def test_what_begins_on_a_page_of_the_flat_is_mapped_on_a_page(tmp_path):
    pieces = (Piece.of("a", (7,), 0), Piece.of("b", (3, 5), 1024), Piece.of("c", (2048,), 2048))
    create(tmp_path / "f", PageFile("x", "master", torch.float32, 5000, pieces))
    for name, tensor in load_file(tmp_path / "f").items():
        assert name.startswith(FILLER) or tensor.data_ptr() % PAGE_BYTES == 0, name


def test_a_part_is_named_by_its_interval():
    assert Piece.of("w", (3, 4), 64) == Piece("w", (3, 4), 64, 12)
    assert Piece.of("w", (3, 4), 0, 5, 12) == Piece("w[5:12]", (7,), 0, 7)
    assert Piece.of("w", (), 0) == Piece("w", (), 0, 1)


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ((Piece("a", (3,), 0, 3), Piece("b", (3,), 2, 3)), "b is at .2, 5.*from 3 on"),
        ((Piece("a", (3,), 8, 3),), "within 10"),
        ((Piece("a", (3,), 0, 4),), "shape .3,. and 4 elements"),
        ((Piece("a", (3,), 0, 3), Piece("a", (3,), 3, 3)), "name a is taken"),
        ((Piece("__pad__.0", (3,), 0, 3),), "is taken"),
        ((Piece("__metadata__", (3,), 0, 3),), "is taken"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(pieces, says):
    with pytest.raises(ValueError, match=f"master of x: .*{says}"):
        PageFile("x", "master", torch.float32, 10, pieces)


def test_a_dtype_that_is_not_kept_is_refused():
    with pytest.raises(ValueError, match=r"torch.complex64 is not kept on disk"):
        PageFile("x", "master", torch.complex64, 10)


def test_many_parameters_make_a_longer_header():
    pieces = tuple(Piece.of(f"layers.{i}.weight", (2,), 64 * i) for i in range(5000))
    header = header_bytes(PageFile("x", "master", torch.float32, 64 * 5000, pieces))
    assert len(header) % PAGE_BYTES == 0 and len(header) > 100 * PAGE_BYTES
    assert header.rstrip(b" ").endswith(b"}")


def test_a_full_disk_is_named_with_both_figures_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"disk full: 12,288 bytes are needed and [\d,]+ are free") as raised:
        create(tmp_path / "f", PageFile("x", "master", torch.float32, 2000))
    assert raised.value.errno == errno.ENOSPC and str(tmp_path / "f") in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_limit_on_files_is_named(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match="limit on files.*4,198,400 bytes are needed") as raised:
            create(tmp_path / "f", PageFile("x", "master", torch.float32, 2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG and not list(tmp_path.iterdir())


def test_a_file_system_without_reservations_gets_a_sparse_file(tmp_path, monkeypatch):
    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    file = PageFile("x", "master", torch.float32, 2000, (Piece.of("a", (2000,), 0),))
    create(tmp_path / "f", file)
    assert torch.equal(load_file(tmp_path / "f")["a"], torch.zeros(2000))


def damaged(content: bytes, how: str) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if how == "shorter":
        return content[:-PAGE_BYTES]
    if how == "header only half there":
        return content[:100]
    if how == "empty":
        return b""
    if how == "not safetensors":
        return b"\xff" * len(content)
    if how == "of another format":
        header["__metadata__"]["format"] = "tritonspeed.flat.99"
    elif how == "of somebody else":
        del header["__metadata__"]
    elif how == "with another length":
        return content.replace(b'"numel":"2000"', b'"numel":"4000"')
    else:
        header["a"]["shape"] = [5]
    return content[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + content[8 + length :]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("shorter", "has 8,192 bytes, must have 12,288: it was cut off"),
        ("header only half there", "header has 92 of 4088 bytes"),
        ("empty", "no safetensors"),
        ("not safetensors", "no safetensors"),
        ("of another format", "tritonspeed.flat.99"),
        ("of somebody else", "not a file of tritonspeed"),
        ("with another length", "not the one that is written"),
        ("with another shape", "shape"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(tmp_path, how, says):
    path = tmp_path / "f"
    create(path, PageFile("x", "master", torch.float32, 2000, (Piece.of("a", (2000,), 0),)))
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(ValueError, match=f"{path}.*{says}"):
        read_header(path)
