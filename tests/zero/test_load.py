"""load_safetensors: the values in files reach parameters, masters and buffers wherever these are, each read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import one_pass, sgd
from models import Net, batch
from safetensors.torch import save_file
from torch import Tensor, nn

import tritonspeed as ts
from tritonspeed.zero import load, tensor_files
from tritonspeed.zero.access import safe_get_full_fp32_param
from tritonspeed.zero.group import group_of, place_of


class Odd(nn.Module):
    """Tied, frozen, small, integer and 0-d tensors; buffers that are saved and that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(tied=True)
        self.net.blocks[1].up.weight.requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.norm.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.scale = nn.Parameter(torch.ones(()))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.net(tokens, targets) * self.scale


def values_of(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values to find again: no two alike, none that the constructor makes; under one name where tied, as saved."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name, value in model.state_dict().items():
        if name == "net.head.weight":
            continue
        wide = torch.randn(value.shape, generator=generator)
        found[name] = wide.to(dtype) if value.is_floating_point() else torch.full(value.shape, 41)
    return found


def save(values: dict[str, Tensor], folder: Path, num_files: int) -> Path:
    """As Hugging Face writes it: one file, or several and their index."""
    folder.mkdir(exist_ok=True)
    if num_files == 1:
        save_file(values, folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(num_files):
        name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(values.items())[number::num_files])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def assert_loaded(model: nn.Module, values: dict[str, Tensor]) -> None:
    """What the modules see is the files' value in their own dtype."""
    with ts.zero.GatheredParameters(model.parameters()):
        state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for name, value in values.items():
            torch.testing.assert_close(state[name].detach(), value.to(state[name].dtype), rtol=0, atol=0, msg=name)
        assert state["net.head.weight"] is state["net.embed.weight"]


def assert_masters(model: nn.Module, values: dict[str, Tensor]) -> None:
    """The masters are the files' values, in fp32, not what the low-precision parameters made of them."""
    for name, p in model.named_parameters():
        if place_of(p)[1].trainable:
            got = safe_get_full_fp32_param(p)
            assert got is not None
            torch.testing.assert_close(got, values[name].float(), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_files", [1, 3])
def test_plain(tmp_path: Path, num_files: int, dtype: torch.dtype) -> None:
    model = Odd()
    values = values_of(model, dtype)
    storages = {p.data_ptr() for p in model.parameters()}
    keys = ts.zero.load_safetensors(model, save(values, tmp_path, num_files))
    assert keys == ([], [])
    assert_loaded(model, values)
    assert {p.data_ptr() for p in model.parameters()} == storages, "in place"


def sharded(folder: str, stage: int, precision: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(dist.get_rank())
    model = Odd()
    values = values_of(model, dtype)
    options = ts.zero.ShardOptions(param_persistence_threshold=30)
    chosen = sgd([p for p in model.parameters() if p.requires_grad])
    model, optimizer = ts.zero.shard(model, chosen, stage=stage, precision=precision, options=options)
    one_pass(model, 0, 0)
    optimizer.step()
    model(*batch(0, 1))  # after a forward stage 3 keeps some units whole
    num_collectives = model._tritonspeed.mesh.flight.seq
    ts.zero.load_safetensors(model, folder)
    assert model._tritonspeed.mesh.flight.seq == num_collectives > 0, "loading sends nothing"
    assert_loaded(model, values)
    assert_masters(model, values)
    loss = one_pass(model, 0, 0)
    optimizer.step()
    assert one_pass(model, 0, 0) < loss


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.bfloat16), ("bf16", torch.float32)])
@pytest.mark.parametrize("stage", range(4))
def test_sharded(ranks: Any, tmp_path: Path, stage: int, precision: str | None, dtype: torch.dtype) -> None:
    ranks(2, sharded, str(save(values_of(Odd(), dtype), tmp_path, 2)), stage, precision, dtype)


def read_by_this_rank(folder: str, part_elems: int) -> tuple[int, int]:
    """(bytes read, the most at once) by this rank at stage 3."""
    model, _ = ts.zero.shard(Net(width=61), None, stage=3, options=ts.zero.ShardOptions(param_persistence_threshold=0))
    sizes = []
    usual, usual_elems = tensor_files.TensorFiles.read, load.PART_ELEMS

    def counted(self: Any, name: str, lo: int, hi: int) -> Tensor:
        values = usual(self, name, lo, hi)
        sizes.append(values.nbytes)
        return values

    tensor_files.TensorFiles.read, load.PART_ELEMS = counted, part_elems
    try:
        ts.zero.load_safetensors(model, folder)
    finally:
        tensor_files.TensorFiles.read, load.PART_ELEMS = usual, usual_elems
    return sum(sizes), max(sizes, default=0)


@pytest.mark.parametrize("world", [1, 3])
def test_each_byte_is_read_by_the_rank_that_keeps_it(ranks: Any, tmp_path: Path, world: int) -> None:
    values = dict(Net(width=61).state_dict())
    found = ranks(world, read_by_this_rank, str(save(values, tmp_path, 2)), 100)
    assert sum(num_bytes for num_bytes, _ in found) == sum(value.nbytes for value in values.values())
    assert max(most for _, most in found) == 400
    assert min(num_bytes for num_bytes, _ in found) > 0


def built_under_init(folder: str, dtype: torch.dtype) -> None:
    torch.manual_seed(dist.get_rank())
    with ts.zero.Init(dtype=torch.bfloat16):
        model = Odd()
    values = values_of(model, dtype)
    ts.zero.load_safetensors(model, folder)
    assert all(group_of(p) is None or p.isnan().all() for p in model.parameters()), "nothing was made whole"
    assert_loaded(model, values)
    model, optimizer = ts.zero.shard(model, sgd(p for p in model.parameters() if p.requires_grad), stage=3)
    assert_loaded(model, values)
    loss = one_pass(model, 0, 0)
    optimizer.step()
    assert one_pass(model, 0, 0) < loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_under_init(ranks: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    ranks(2, built_under_init, str(save(values_of(Odd(), dtype), tmp_path, 3)), dtype)


def while_it_is_built(folder: str) -> None:
    with ts.zero.Init():
        model = nn.Sequential(Net(tied=True))
        ts.zero.load_safetensors(model[0], folder)
        assert model[0].embed.weight[0, 0] == model[0].embed.weight[0, 0], "open again, and not NaN"
    with ts.zero.GatheredParameters(model.parameters()):
        assert all((p == 3).all() for p in model.parameters())


def test_inside_the_context_that_builds_it(ranks: Any, tmp_path: Path) -> None:
    values = {name: torch.full_like(value, 3.0) for name, value in Net(tied=True).state_dict().items()}
    del values["head.weight"]
    ranks(2, while_it_is_built, str(save(values, tmp_path, 1)))


def from_meta(folder: str, stage: int, precision: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(dist.get_rank())
    values = values_of(Odd(), dtype)
    with torch.device("meta"):
        model = Odd()
    model.norm.scratch = torch.zeros(2)
    ts.zero.load_safetensors(model, folder)
    assert all(p.device.type == "meta" for p in model.parameters())
    model, optimizer = ts.zero.shard(
        model, sgd(p for p in model.parameters() if p.requires_grad), stage=stage, precision=precision
    )
    assert_loaded(model, values)
    assert_masters(model, values)
    loss = one_pass(model, 0, 0)
    optimizer.step()
    assert one_pass(model, 0, 0) < loss


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.bfloat16), ("bf16", torch.float32)])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_from_meta(ranks: Any, tmp_path: Path, stage: int, precision: str | None, dtype: torch.dtype) -> None:
    ranks(2, from_meta, str(save(values_of(Odd(), dtype), tmp_path, 3)), stage, precision, dtype)


def test_a_part_of_a_model_on_meta_and_from_two_places(tmp_path: Path) -> None:
    values = {name: torch.full_like(value, 5.0) for name, value in Net().state_dict().items()}
    some = {name: value for name, value in values.items() if name.startswith("blocks.1")}
    rest = {name: value for name, value in values.items() if not name.startswith("blocks.1")}
    with torch.device("meta"):
        model = nn.Sequential(Net())
    keys = ts.zero.load_safetensors(model[0], save(some, tmp_path / "some", 1), strict=False)
    assert sorted(keys.missing_keys) == sorted(rest) and keys.unexpected_keys == []
    ts.zero.load_safetensors(model[0], save(rest, tmp_path / "rest", 1), strict=False)
    model, _ = ts.zero.shard(model, None, stage=3)
    with ts.zero.GatheredParameters(model.parameters()):
        assert all((p == 5).all() for p in model.parameters())


def test_a_shard_beside_its_master_is_loaded_too(tmp_path: Path) -> None:
    """Stochastic rounding keeps the 16-bit copy, because the master does not tell it."""
    optimizer = ts.optim.AdamW((model := Net()).parameters(), stochastic_rounding=True)
    options = ts.zero.ShardOptions(param_persistence_threshold=0)
    model, _ = ts.zero.shard(model, optimizer, stage=3, precision="bf16", options=options)
    values = {name: torch.full_like(value, 5.0) for name, value in Net().state_dict().items()}
    ts.zero.load_safetensors(model, save(values, tmp_path, 1))
    assert any(bucket.shard is not None for bucket in model._tritonspeed.buckets), "it is kept"
    with ts.zero.GatheredParameters(model.parameters()):
        assert all((p == 5).all() for p in model.parameters())


def test_names_that_do_not_match(tmp_path: Path) -> None:
    model = Net()
    values = dict(model.state_dict())
    values["other.weight"] = values.pop("norm.weight")
    save(values, tmp_path, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing: 'norm.weight'; unexpected: 'other.weight'"):
        ts.zero.load_safetensors(model, tmp_path)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    keys = ts.zero.load_safetensors(model, tmp_path, strict=False)
    want = Net().load_state_dict(values, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (want.missing_keys, want.unexpected_keys)
    keys = ts.zero.load_safetensors(model, tmp_path, rename=lambda name: name.replace("other", "norm"))
    assert keys == ([], [])
    with pytest.raises(ValueError, match=r"rename= makes 'norm' of both"):
        ts.zero.load_safetensors(model, tmp_path, rename=lambda name: "norm")
    keys = ts.zero.load_safetensors(model, tmp_path, strict=False, rename=lambda name: None)
    assert len(keys.missing_keys) == len(values) and keys.unexpected_keys == []


def test_shapes_and_kinds_that_do_not_match(tmp_path: Path) -> None:
    values = {name: torch.full_like(value, 2.0) for name, value in Net().state_dict().items()}
    values["norm.weight"] = torch.ones(14)
    values["norm.bias"] = torch.ones(13, dtype=torch.int8)
    save(values, tmp_path, 1)
    model = Net()
    with pytest.raises(ValueError, match=r"'norm.weight' is \(13,\) and the file has \(14,\); 'norm.bias' is .*int8"):
        ts.zero.load_safetensors(model, tmp_path)
    assert not (model.embed.weight == 2).any(), "checked before anything is changed"


def broken(folder: Path, what: str) -> Path:
    """A checkpoint of ``Net`` that is wrong in one way."""
    save(dict(Net().state_dict()), folder, 2)
    index = folder / "model.safetensors.index.json"
    first, second = sorted(folder.glob("model-*"))
    content = json.loads(index.read_text())
    if what == "a file is absent":
        second.unlink()
    elif what == "a name is in another file":
        content["weight_map"] = dict.fromkeys(content["weight_map"], first.name)
    elif what == "outside":
        content["weight_map"]["norm.weight"] = f"../{folder.name}/{first.name}"
    elif what == "outside, from the root":
        content["weight_map"]["norm.weight"] = str(first)
    elif what == "outside, in Windows":
        content["weight_map"]["norm.weight"] = f"..\\{first.name}"
    elif what == "cut short":
        first.write_bytes(first.read_bytes()[:-4])
    elif what == "not safetensors":
        first.write_bytes(b"no" * 100)
    elif what == "an empty file":
        first.write_bytes(b"")
    elif what == "a header that is no JSON":
        first.write_bytes((8).to_bytes(8, "little") + b"{'a': 1}")
    elif what == "an unknown dtype":
        header = json.dumps({"norm.weight": {"dtype": "F3", "shape": [1], "data_offsets": [0, 1]}}).encode()
        first.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    elif what == "bytes that do not fit the shape":
        header = json.dumps({"norm.weight": {"dtype": "F32", "shape": [13], "data_offsets": [0, 4]}}).encode()
        first.write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    elif what == "no index":
        index.unlink()
    if what == "an index without a map":
        index.write_text("{}")
    elif what != "no index":
        index.write_text(json.dumps(content))
    return folder


BROKEN = {
    "a file is absent": "'model-00002-of-00002.safetensors' is not there",
    "a name is in another file": "says that model-00001-of-00002.safetensors holds .* and it does not",
    "outside": "outside its folder",
    "outside, from the root": "outside its folder",
    "outside, in Windows": "outside its folder",
    "cut short": "damaged or cut short: .* the file has",
    "not safetensors": "no safetensors file, or is cut short",
    "an empty file": "no safetensors file, or is cut short: 0 bytes",
    "a header that is no JSON": "its header cannot be read",
    "an unknown dtype": "dtype F3 is none of F64",
    "bytes that do not fit the shape": "damaged or cut short: 'norm.weight'",
    "no index": r"has neither model.safetensors nor .*, it has 'model-00001",
    "an index without a map": "is no index of safetensors files",
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_are_wrong(tmp_path: Path, what: str) -> None:
    with pytest.raises(ValueError, match=BROKEN[what]):
        ts.zero.load_safetensors(Net(), broken(tmp_path / "broken", what))


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no .*nowhere"):
        ts.zero.load_safetensors(Net(), tmp_path / "nowhere")


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    save(dict(Net().state_dict()), tmp_path, 1)
    files = tensor_files.TensorFiles(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    last = max(files.entries, key=lambda name: files.entries[name].begin)
    with pytest.raises(ValueError, match="has become shorter: 4 bytes are missing"):
        files.read(last, 0, files.entries[last].numel)


def test_links_as_in_the_hub_are_followed(tmp_path: Path) -> None:
    blobs = save(dict(Net().state_dict()), tmp_path / "blobs", 2)
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    assert ts.zero.load_safetensors(Net(), snapshot / "model.safetensors.index.json") == ([], [])


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_dtype_and_any_interval(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {"a": torch.arange(5).to(dtype), "b": (torch.arange(77) % 3).to(dtype).view(7, 11), "c": torch.ones(0, 3)}
    save_file(values, tmp_path / "x.safetensors")
    files = tensor_files.TensorFiles(tmp_path / "x.safetensors")
    assert files.entries["b"].shape == (7, 11) and files.entries["b"].dtype == dtype
    for lo, hi in [(0, 77), (1, 2), (76, 77), (13, 13), (5, 60)]:
        got = files.read("b", lo, hi)
        assert got.dtype == dtype and torch.equal(got.float(), values["b"].flatten()[lo:hi].float())
    assert files.read("c", 0, 0).numel() == 0 and list(files.parts("c", 0, 0, 1)) == []
