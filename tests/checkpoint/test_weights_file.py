"""Plans and files of whole tensors: what the safetensors library writes, to the byte; sizes; one tensor, two names."""

from __future__ import annotations

import errno
import json
import os
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from tritonspeed.checkpoint.weights_file import WeightsWriter, parse_shard_size, plan_weights, write_tensors
from tritonspeed.offload.page_file import DTYPES

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6).filter(lambda n: n != "__metadata__"),
    st.tuples(SHAPES, st.sampled_from(sorted(DTYPES, key=str))),
    max_size=8,
)


def filled(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: (torch.rand(s, generator=generator) * 100).to(d) for n, (s, d) in shapes.items()}


def written(folder, shapes, values, max_shard_bytes):
    plan = plan_weights(shapes, max_shard_bytes)
    with WeightsWriter(folder, plan) as writer:
        for name, tensor in values.items():
            writer.write(name, 0, tensor.reshape(-1))
        writer.write_frame()
        writer.sync()
    return plan


@settings(deadline=None, max_examples=60)
@given(shapes=TENSORS)
def test_one_file_is_what_the_library_writes_to_the_byte(tmp_path_factory, shapes) -> None:
    folder, values = tmp_path_factory.mktemp("one"), filled(shapes)
    written(folder, shapes, values, None)
    assert (folder / "model.safetensors").read_bytes() == save(values, {"format": "pt"})
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


@settings(deadline=None, max_examples=40)
@given(shapes=TENSORS, bound=st.integers(1, 200))
def test_shards_keep_to_the_bound_and_the_index_finds_all(tmp_path_factory, shapes, bound) -> None:
    folder, values = tmp_path_factory.mktemp("many"), filled(shapes)
    plan = written(folder, shapes, values, bound)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(plan.sizes) == files
    loaded = {}
    for number, file in enumerate(files, 1):
        if len(files) > 1:
            assert file == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        found = load_file(folder / file)
        num_bytes = sum(t.nbytes for t in found.values())
        assert num_bytes <= bound or sum(t.nbytes > 0 for t in found.values()) == 1, (file, num_bytes)
        assert not found.keys() & loaded.keys()
        loaded |= found
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: place.file for name, place in plan.places.items()}
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in values.values()) == plan.num_bytes


def test_values_are_cast_part_by_part(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tritonspeed.checkpoint.weights_file.PART_ELEMS", 7)
    wide = torch.randn(5, 9)
    plan = plan_weights({"a": ((5, 9), torch.bfloat16)})
    with WeightsWriter(tmp_path, plan) as writer:
        writer.write_frame()
        writer.write("a", 20, wide.reshape(-1)[20:])
        writer.write("a", 0, wide.reshape(-1)[:20])
        with pytest.raises(AssertionError, match=r"elements \[44, 46\) of 45"):
            writer.write("a", 44, wide[0, :2])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], wide.bfloat16())


def test_a_plan_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="max_shard_bytes 0 must be at least 1"):
        plan_weights({}, 0)
    with pytest.raises(ValueError, match=r"'c' of torch.complex64: safetensors has no such tensor"):
        plan_weights({"c": ((2,), torch.complex64)})
    with pytest.raises(ValueError, match="100,001 files, must be at most 99,999"):
        plan_weights({str(i): ((1,), torch.int8) for i in range(100_001)}, 1)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("5GB", 5 * 10**9),
        ("2GiB", 2**31),
        ("1.5 mb", 1_500_000),
        ("7KB", 7000),
        (123, 123),
        (None, None),
        ("1TB", 10**12),
    ],
)
def test_sizes_of_shards(text, num_bytes) -> None:
    assert parse_shard_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "5", "-1GB", "5 gigabytes", 0, -3, "0GB", True, 2.5, "1e400GB"])
def test_sizes_that_are_none(text) -> None:
    with pytest.raises(ValueError, match="write bytes, or a number and a unit"):
        parse_shard_size(text)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_one_file_of_tensors(tmp_path, file) -> None:
    whole = torch.randn(6, 4)
    tensors = {
        "view": whole[1:3],
        "transposed": whole.t(),
        "tied": whole,
        "other name": whole,
        "scalar": torch.tensor(3.0),
        "ids": torch.arange(3),
        "empty": torch.empty(0, 3),
    }
    (tmp_path / file).write_text("an older one")
    write_tensors(tmp_path / file, tensors, torch.float16)
    is_safe = file.endswith(".safetensors")
    found = load_file(tmp_path / file) if is_safe else torch.load(tmp_path / file, weights_only=True)
    assert set(found) == set(tensors) - ({"other name"} if is_safe else set())
    for name, value in found.items():
        wanted = tensors[name].half() if tensors[name].is_floating_point() else tensors[name]
        assert torch.equal(value, wanted), name
        assert value.dtype == wanted.dtype
    if not is_safe:
        assert found["tied"].data_ptr() == found["other name"].data_ptr()
        assert found["view"].untyped_storage().nbytes() == 2 * 4 * 2  # not the whole that it is a view of
    assert os.listdir(tmp_path) == [file]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("an older one")
    with pytest.raises(ValueError, match="safetensors has no such tensor"):
        write_tensors(path, {"a": torch.zeros(2, dtype=torch.complex64)})
    assert path.read_text() == "an older one"
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_the_system_refuses_is_named(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("an older one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large: it is to have 4,[0-9]{3} bytes, .* are free") as caught:
            write_tensors(path, {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and caught.value.filename.endswith("model.safetensors")
    assert path.read_text() == "an older one"
    assert os.listdir(tmp_path) == [path.name]
