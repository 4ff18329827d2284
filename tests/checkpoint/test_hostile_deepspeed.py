"""Hostile .pt files: refused with a reason, or read right. Nothing in them is called, nothing is written, no memory is
taken that is not there as bytes."""

from __future__ import annotations

import io
import os
import pickle
import random
import resource
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_fixture import Made, unpack
from hostile import Watch, mutate

from tritonspeed.checkpoint import CheckpointError, CorruptCheckpoint, ParameterFacts, RunFacts
from tritonspeed.checkpoint.deepspeed.facts import KNOWN
from tritonspeed.checkpoint.deepspeed.files import DeepSpeedCheckpoint
from tritonspeed.checkpoint.deepspeed.torch_file import Standin, TorchFile
from tritonspeed.checkpoint.deepspeed.universal import UniversalCheckpoint, write_universal

WATCH = Watch()
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:pickletools", "ignore:.*quantize.*:UserWarning", "ignore:.*nested.*:UserWarning"
)
CASES = ("stage2-fp16", "stage3-bf16", "stage1-bf16-fp32accum", "stage0-fp32", "stage3-bf16-universal")
MOST_BYTES = 256 * 2**20  # that a refusal may add to the process; torch's own modules are among them


class Spoiled:
    """One case, and a copy of it to spoil."""

    def __init__(self, made: Made, path: Path) -> None:
        self.made, self.good, self.path = made, made.path, path
        self.kind = UniversalCheckpoint if made.is_universal else DeepSpeedCheckpoint
        shutil.copytree(self.good, path)
        files = (p.relative_to(self.good) for p in self.good.rglob("*.pt"))
        self.files = sorted(
            f for f in files if len(f.parts) == 1 or "gain" in f.parts or f.name == "optimizer_state.pt"
        )

    def times(self, total: int) -> int:
        """How often to spoil each file; universal ones are fifty to be read each time."""
        return total // (3 if self.made.is_universal else 1) // len(self.files)

    def outcome(self, file: Path, content: bytes, any_values: bool = False) -> str:
        """Read everything while ``file`` has other content: "right", or "refused" with a reason."""
        (self.path / file).write_bytes(content)
        try:
            with WATCH.on(self.path):
                return self._read(any_values)
        except CheckpointError as error:
            assert str(self.path) in str(error)
            str(error).encode()
            return "refused"
        finally:
            shutil.copyfile(self.good / file, self.path / file)

    def _read(self, any_values: bool) -> str:
        source = self.kind(self.path)
        want = self.made.values()
        for name, facts in source.parameters.items():
            for kind in sorted(source.kinds(name)):
                numel = prod(facts.shape)
                got = source.read(kind, name, 0, numel)
                assert type(got) is torch.Tensor and got.shape == (numel,)
                assert any_values or torch.equal(got, want[kind, name].flatten()), f"wrong values: {kind} of {name}"
            assert all(type(v) is float for v in source.scalars(name).values())
        assert isinstance(source.rank_state(0)["buffers"], dict) and source.facts.global_steps >= 0
        return "right"


@pytest.fixture(scope="module")
def spoiled() -> Iterator[dict[str, Spoiled]]:
    """In memory where there is a place for it."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else None))
    unpack(folder / "good")
    yield {name: Spoiled(Made(folder / "good" / name), folder / name) for name in CASES}
    shutil.rmtree(folder)


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip with right CRC-32s, whatever is in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return stream.getvalue()


def with_pickle(content: bytes, pickled: bytes) -> bytes:
    found = members(content)
    return archive_of({name: pickled if name.endswith("/data.pkl") else data for name, data in found.items()})


def pickle_of(content: bytes) -> bytes:
    return next(data for name, data in members(content).items() if name.endswith("/data.pkl"))


@pytest.mark.parametrize("name", CASES)
def test_the_good_one_is_read(spoiled: dict[str, Spoiled], name: str):
    case = spoiled[name]
    for file in case.files:
        content = (case.good / file).read_bytes()
        assert case.outcome(file, content) == "right"
        # packed again by another program, too: what is refused below is not refused for that
        assert case.outcome(file, archive_of(members(content))) == "right"


# bombs


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def called(module: str, name: str, *arguments: Any, opcode: bytes = b"R") -> bytes:
    """A pickle of protocol 2 that calls ``module.name(*arguments)``; the function need not exist."""
    inner = pickle.dumps(arguments, protocol=2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + inner + opcode + b"."


def bombs(marker: str) -> dict[str, bytes]:
    """Each would leave a file ``marker`` behind, or take a terabyte."""
    touch = f"touch {marker}"
    code = f"open({marker!r}, 'w').close()"
    return {
        "os.system": called("os", "system", touch),
        "posix.system": called("posix", "system", touch),
        "subprocess": called("subprocess", "getoutput", touch),
        "eval": called("builtins", "eval", code),
        "eval of Python 2": called("__builtin__", "eval", code),
        "exec": called("builtins", "exec", code),
        "open": called("builtins", "open", marker, "w"),
        "getattr": called("builtins", "getattr", "x", "upper"),
        "torch.load": called("torch", "load", marker),
        "torch.save": called("torch", "save", 1, marker),
        "hub": called("torch.hub", "load", marker, "x"),
        "run_path": called("runpy", "run_path", marker),
        "mkdir": called("pathlib", "Path.mkdir", marker),
        "partial": called("functools", "partial", 1),
        "dynamic library": called("ctypes", "CDLL", marker),
        "reconstructor": called("copy_reg", "_reconstructor", 1, 2, 3),
        "array of a gigabyte": called("builtins", "bytearray", 10**9),
        "array of a terabyte": called("builtins", "bytearray", 10**12),
        "array of a terabyte, Python 2": called("__builtin__", "bytearray", 10**12),
        "storage of a terabyte": called("torch.storage", "UntypedStorage", 10**12, opcode=b"\x81"),
        "tensor of a terabyte": called("torch", "FloatTensor", 10**12, opcode=b"\x81"),
        "numpy": called("numpy.core.multiarray", "_reconstruct", 1, (10**12,), b"b"),
        "meta tensor": called("torch._utils", "_rebuild_meta_tensor_no_storage", torch.float32, (10**12,), (1,), False),
        "codec": called("_codecs", "encode", "x", "rot13"),
        "by protocol 4": pickle.dumps(Call(os.system, touch), protocol=4),
        "by protocol 0": pickle.dumps(Call(os.system, touch), protocol=0),
        "no pickle": b"not a pickle at all",
        "nothing": b"",
        "only a stop": b"\x80\x02.",
        "text of 4 GiB": b"\x80\x02X\xff\xff\xff\xff" + b"x",
        "levels": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "itself": b"\x80\x02]q\x00h\x00a.",
        "laughs": b"\x80\x02" + b"]q\x00" + b"".join(b"]q\x01(h\x00h\x00h\x00h\x00eq\x00" for _ in range(40)) + b".",
    }


@pytest.mark.parametrize("name", CASES)
def test_bombs_do_not_go_off(spoiled: dict[str, Spoiled], name: str, tmp_path: Path):
    case, marker = spoiled[name], tmp_path / "went_off"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in case.files:
        content = (case.good / file).read_bytes()
        for what, pickled in bombs(str(marker)).items():
            assert case.outcome(file, with_pickle(content, pickled)) == "refused", f"{what} in {file}"
            assert not marker.exists(), f"{what} in {file}"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def test_a_bomb_deep_inside_is_named(spoiled: dict[str, Spoiled]):
    case = spoiled["stage2-fp16"]
    file = case.path / "mp_rank_00_model_states.pt"
    held = torch.load(case.good / file.name, weights_only=True)
    torch.save({**held, "ds_config": {"deep": [Call(os.system, "true")]}}, file)
    with pytest.raises(CorruptCheckpoint, match=r"posix\.system"):
        DeepSpeedCheckpoint(case.path)
    shutil.copyfile(case.good / file.name, file)


# archives


def test_archives_that_torch_does_not_write(spoiled: dict[str, Spoiled]):
    case = spoiled["stage2-fp16"]
    file = Path("mp_rank_00_model_states.pt")
    content = (case.good / file).read_bytes()
    found = members(content)
    root = next(iter(found)).split("/")[0]

    def flagged() -> bytes:
        spoilt = bytearray(archive_of(found))
        spoilt[spoilt.rfind(b"PK\x01\x02") + 8] |= 1  # "encrypted", in the last entry of the directory
        return bytes(spoilt)

    def doubled() -> bytes:
        stream = io.BytesIO(archive_of(found))
        with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning):
            archive.writestr(f"{root}/data.pkl", called("os", "system", "true"))
        return stream.getvalue()

    ways: dict[str, bytes] = {
        "packed": archive_of(found, zipfile.ZIP_DEFLATED),
        "packed a thousandfold": archive_of({**found, f"{root}/data/99": bytes(2**26)}, zipfile.ZIP_DEFLATED),
        "out of the folder": archive_of({**found, f"{root}/../../x": b"1"}),
        "absolute": archive_of({**found, "/etc/x": b"1"}),
        "another root": archive_of({**found, "other/data.pkl": b"1"}),
        "a program": archive_of({**found, f"{root}/constants.pkl": b"1"}),
        "no pickle": archive_of({n: d for n, d in found.items() if not n.endswith("data.pkl")}),
        "no member": archive_of({}),
        "twice": doubled(),
        "flagged": flagged(),
        "half": content[: len(content) // 2],
        "something before": b"#!/bin/sh\n" + content,
        "old format": pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + bytes(100),
        "empty": b"",
        "a storage less": archive_of({n: d for n, d in found.items() if not n.endswith("data/0")}),
        "a shorter storage": archive_of({n: d[:-8] if n.endswith("data/0") else d for n, d in found.items()}),
    }
    for what, spoilt in ways.items():
        assert case.outcome(file, spoilt) == "refused", what


@pytest.mark.parametrize("name", CASES)
def test_flipped_and_cut(spoiled: dict[str, Spoiled], name: str):
    """Found, or without effect (dates, padding, a member that is not read)."""
    case, rng, found = spoiled[name], random.Random(name), 0
    for file in case.files:
        content = (case.good / file).read_bytes()
        for _ in range(case.times(350)):
            spoilt = bytearray(content)
            way, at = rng.randrange(4), rng.randrange(len(spoilt))
            if way == 0:
                del spoilt[at:]
            elif way == 1:
                spoilt[at : at + rng.randint(1, 40)] = rng.randbytes(rng.randint(0, 40))
            else:
                spoilt[at] ^= 1 << rng.randrange(8)
            found += case.outcome(file, bytes(spoilt)) == "refused"
    assert found > 0.5 * case.times(350) * len(case.files)


@pytest.mark.parametrize("name", CASES)
def test_other_pickles_with_right_checksums(spoiled: dict[str, Spoiled], name: str):
    """Bytes of the pickle changed, dropped, doubled and exchanged: it may say something else, and do nothing else."""
    case, rng, found = spoiled[name], random.Random(name), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in case.files:
        content = (case.good / file).read_bytes()
        good = pickle_of(content)
        for _ in range(case.times(300)):
            spoilt = bytearray(good)
            for _ in range(rng.choice((1, 1, 1, 2, 4))):
                at, other, length = rng.randrange(len(spoilt)), rng.randrange(len(spoilt)), rng.randint(1, 12)
                way = rng.randrange(5)
                if way == 0:
                    spoilt[at] = rng.randrange(256)
                elif way == 1:
                    del spoilt[at : at + length]
                elif way == 2:
                    spoilt[at:at] = spoilt[other : other + length]
                elif way == 3:
                    spoilt[at : at + length] = spoilt[other : other + length]
                else:
                    spoilt[at] ^= 1 << rng.randrange(8)
                spoilt = spoilt or bytearray(b".")
            found += case.outcome(file, with_pickle(content, bytes(spoilt)), any_values=True) == "refused"
    assert found > 0.3 * case.times(300) * len(case.files)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


@pytest.mark.parametrize("name", CASES)
def test_other_contents_saved_by_torch(spoiled: dict[str, Spoiled], name: str):
    """A value of the tree made hostile, near, another's, doubled or gone, and all of it saved again."""
    case, rng = spoiled[name], random.Random(name)
    outcomes = {"right": 0, "refused": 0}
    for file in case.files:
        held = plain(TorchFile(case.good / file, KNOWN).content, {})
        if not isinstance(held, dict):
            continue
        for _ in range(case.times(120)):
            changed = copied(held)
            mutate(changed, rng)
            stream = io.BytesIO()
            torch.save(changed, stream)
            outcomes[case.outcome(file, stream.getvalue(), any_values=True)] += 1
    assert outcomes["refused"] and outcomes["right"]


def plain(value: Any, tied: dict[int, torch.Tensor]) -> Any:
    """Stand-ins left out: torch cannot save them; tensors of a storage of their own, unless they are tied."""
    if isinstance(value, dict):
        return {key: plain(each, tied) for key, each in value.items() if not isinstance(each, Standin)}
    if isinstance(value, list | tuple):
        return [plain(each, tied) for each in value]
    return tied.setdefault(value.data_ptr(), value.clone()) if isinstance(value, torch.Tensor) else value


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, list) else value


# tensors that are not what they say


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: torch.zeros(8, device="meta"),
        lambda: torch.zeros(3, 3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.zeros(4, dtype=torch.complex64).conj(),
    ],
)
def test_tensors_that_are_no_run_of_values(spoiled: dict[str, Spoiled], make: Callable[[], torch.Tensor]):
    case, file = spoiled["stage2-fp16"], Path("mp_rank_00_model_states.pt")
    held = torch.load(case.good / file, weights_only=True)
    held["module"]["gain"] = make()
    stream = io.BytesIO()
    torch.save(held, stream)
    assert case.outcome(file, stream.getvalue(), any_values=True) == "refused"


@pytest.mark.parametrize("size", [(-5,), (2**62,), (6,), (5, 2**40), (0.5,)])
@pytest.mark.parametrize("stride", [(1,), (-1,), (2**40,), (0,)])
def test_sizes_beyond_the_storage(spoiled: dict[str, Spoiled], size: tuple[Any, ...], stride: tuple[int, ...]):
    """A tensor's size and stride are numbers in the pickle."""
    case, file = spoiled["stage2-fp16"], Path("zero_pp_rank_0_mp_rank_00_optim_states.pt")
    if stride == (0,) and size == (6,):
        size = (10**9,)
    content = (case.good / file).read_bytes()
    numel = 4096 if len(members(content)) < 3 else 5
    rebuilt = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
        b"X\x03\x00\x00\x00cpuK" + bytes([numel]) + b"tQK\x00"
    )
    rebuilt += pickle.dumps(size, protocol=2)[2:-1] + pickle.dumps(stride, protocol=2)[2:-1]
    rebuilt += b"\x89ccollections\nOrderedDict\n)RtR."
    assert case.outcome(file, with_pickle(content, rebuilt)) == "refused"


def test_a_storage_longer_than_the_file(spoiled: dict[str, Spoiled]):
    case, file = spoiled["stage3-bf16"], Path("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    content = (case.good / file).read_bytes()
    pickled = pickle_of(content)
    held = TorchFile(case.good / file, KNOWN).content
    numel = held["optimizer_state_dict"]["fp32_flat_groups"][0].untyped_storage().nbytes() // 4
    for other in (numel * 1000, 2**31 - 1):
        spoilt = pickled.replace(number(numel), number(other))
        assert spoilt != pickled
        assert case.outcome(file, with_pickle(content, spoilt)) == "refused"


def number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


# names that are paths


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "..", ".", "a/b", "a\0b", "", "x" * 300])
def test_names_of_parameters_lead_nowhere(spoiled: dict[str, Spoiled], name: str):
    case, file = spoiled["stage3-bf16-universal"], Path("zero_pp_rank_0_mp_rank_00_model_states.pt")
    held = torch.load(case.good / file, weights_only=True)
    shapes = held["param_shapes"][0]
    shapes[name] = shapes.pop("blocks.0.up.weight")
    stream = io.BytesIO()
    torch.save(held, stream)
    assert case.outcome(file, stream.getvalue()) == "refused"


def test_links_are_not_followed(spoiled: dict[str, Spoiled], tmp_path: Path):
    case = spoiled["stage3-bf16-universal"]
    gain = case.path / "zero/gain"
    shutil.copytree(gain, tmp_path / "gain")
    shutil.rmtree(gain)
    gain.symlink_to(tmp_path / "gain")
    with pytest.raises(CorruptCheckpoint, match="gain"):
        UniversalCheckpoint(case.path)
    gain.unlink()
    shutil.copytree(tmp_path / "gain", gain)
    (gain / "fp32.pt").unlink()
    (gain / "fp32.pt").symlink_to(tmp_path / "gain/fp32.pt")
    with pytest.raises(CorruptCheckpoint, match="symbolic link"):
        UniversalCheckpoint(case.path).read("master", "gain", 0, 5)
    (gain / "fp32.pt").unlink()
    shutil.copyfile(tmp_path / "gain/fp32.pt", gain / "fp32.pt")


class Named:
    """A source with one parameter of a name."""

    path = Path("nowhere")
    facts = RunFacts()

    def __init__(self, name: str) -> None:
        self.parameters = {name: ParameterFacts((2,), torch.float32)}

    def kinds(self, name: str) -> frozenset[str]:
        return frozenset(("master",))

    def read(self, kind: str, name: str, lo: int, hi: int) -> torch.Tensor:
        return torch.zeros(hi - lo)

    def read_own(self, kind: str, rank: int, name: str, lo: int, hi: int) -> None:
        return None

    def scalars(self, name: str) -> dict[str, float]:
        return {}

    def rank_state(self, rank: int) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "..", ".", "a/b", "a\\b", "a\0b", "", "x" * 300])
def test_nothing_is_written_outside(tmp_path: Path, name: str):
    target = tmp_path / "in/side/universal"
    with pytest.raises(ValueError, match="would be a folder of that name"):
        write_universal(Named(name), target)
    assert list(tmp_path.iterdir()) == []


def test_a_kind_is_no_path_either(tmp_path: Path):
    source = Named("weight")
    source.kinds = lambda name: frozenset(("master", "../../../outside"))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="not a plain file name"):
        write_universal(source, tmp_path / "in/side/universal")
    assert not list(tmp_path.rglob("outside*"))


def test_what_is_no_file(spoiled: dict[str, Spoiled]):
    """A pipe or a folder in place of a file."""
    case = spoiled["stage2-fp16"]
    file = case.path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CorruptCheckpoint, match="no regular file"):
        case.kind(case.path).read("master", "blocks.1.down.weight", 0, 12)
    file.unlink()
    file.mkdir()
    with pytest.raises(CorruptCheckpoint, match="folder|no regular file"):
        case.kind(case.path).read("exp_avg", "blocks.1.down.weight", 0, 12)
    file.rmdir()
    shutil.copyfile(case.good / file.name, file)
