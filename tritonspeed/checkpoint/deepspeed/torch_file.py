"""Files that ``torch.save`` has written, read as data: nothing in them is called, nothing outside is touched.

    archive   every member is stored, once, inside the file, under one root       read from the zip's own directory
    names     every global that the pickle names is one of those below            read from its opcodes, nothing run
    values    torch.load(weights_only=True, mmap=True)                            tensors stay in the file until read
    copy      plain dicts, lists, numbers and tensors; what has too many          no attribute of a loaded object is
              members or levels is refused                                        looked at before this

``weights_only`` alone would let a file ask for ``bytearray(10**12)``, and hand out tensors with attributes of the
file's choosing. DeepSpeed pickles a few classes of its own; ``Standin`` takes their places and keeps what they held.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import struct
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonspeed.checkpoint.data_file import Verify, opened
from tritonspeed.checkpoint.errors import CheckpointError, CorruptCheckpoint

MOST_MEMBERS = 2**20  # of an archive
MOST_PICKLE_BYTES = 2**28
MENTIONS = 4  # values that one byte of a pickle may stand for: what is mentioned twice counts twice, and nested
FEW_VALUES = 10_000  # mentions multiply
MOST_LEVELS = 48
SAMPLED_MEMBERS = 8  # one of so many is checked under "sampled"
_PROTOCOL = 2
_BLOCK_BYTES = 8 * 2**20
_LENGTHS = 26  # where a member's own header has the lengths of its name and of what follows that
_LOADING = threading.Lock()  # torch's list of safe globals is one for the process

_STORAGES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2, "Char": 1, "Byte": 1}
_STORAGE_BYTES = {f"torch {name}Storage": size for name, size in {**_STORAGES, "Bool": 1}.items()}  # of an element
_DTYPES = ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
SAFE_GLOBALS = frozenset(
    [
        "collections OrderedDict",
        "torch Size",
        "torch Tensor",  # as the type that _rebuild_from_type_v2 is given
        "torch._tensor _rebuild_from_type_v2",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "__builtin__ set",
        *_STORAGE_BYTES,
        *(f"torch {name}" for name in _DTYPES),
    ]
)
_ATOMS = frozenset(("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "GLOBAL"))


class Standin:
    """In place of an object of a class that is not here: what it was made with, and what it held.

    Attributes:
        args: what it was called with.
        held: its attributes.
    """

    args: tuple[Any, ...] = ()
    held: Any = None

    def __new__(cls, *args: Any) -> Standin:
        made = object.__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.held = state


def standins(*names: str) -> dict[str, type[Standin]]:
    """A stand-in for each global: {"module.Class": its own subclass of ``Standin``, of the name "Class"}."""
    return {name: type(name.rsplit(".", 1)[-1], (Standin,), {}) for name in names}


class TorchFile:
    """One file; read on construction, tensors as they are touched.

    Args:
        path: a regular file; links are not followed.
        known: stand-ins for globals that may be named beside torch's own.
        verify: whether ``check`` compares the archive's CRC-32 of every tensor's storage, of a sample, or of none.

    Attributes:
        content: what was saved, in dicts, lists, tuples, sets, numbers, texts, dtypes, tensors and stand-ins.

    Raises:
        CorruptCheckpoint: it is no such file, was cut off or changed, or names what it may not: says what.
    """

    def __init__(self, path: Path, known: dict[str, type[Standin]] | None = None, verify: Verify = "full") -> None:
        self.path, self.verify = path, verify
        self._checked: set[str] = set()
        known = known or {}
        try:
            with opened(path):
                pass  # a regular file of this folder
            self._members = _check_archive(path)
            sizes = {member.filename.split("/", 1)[-1]: member.file_size for member in self._members}
            pickled = _read_pickle(path, self._members)
            _check_pickle(pickled, path, known, sizes)
            copier = _Copier(path, FEW_VALUES + MENTIONS * len(pickled))
            self.content = copier.copy(_load(path, known), 0)
            self._places = _places(path, self._members, copier.storages)
        except CheckpointError:
            raise
        except Exception as error:  # whatever torch, zipfile and pickletools make of a damaged file
            raise CorruptCheckpoint(f"{path} is damaged: {_said(error)}") from error

    def check(self, value: Tensor) -> Tensor:
        """Compare the bytes of a tensor's storage with their CRC-32, once, and give it back.

        Args:
            value: of ``content``.

        Raises:
            CorruptCheckpoint: they are not what was written.
        """
        place = self._places.get(value.untyped_storage().data_ptr())
        wanted = self._members if place is None else [self._members[place]]
        if self.verify == "sampled":
            wanted = [member for member in wanted if self._members.index(member) % SAMPLED_MEMBERS == 0]
        if self.verify == "none" or not value.numel():
            return value
        try:
            with zipfile.ZipFile(self.path) as archive:
                for member in wanted:
                    if member.filename not in self._checked:
                        _pass_over(archive, member)
                        self._checked.add(member.filename)
        except Exception as error:
            raise CorruptCheckpoint(f"{self.path} is damaged: {_said(error)}") from error
        return value


def _places(path: Path, members: list[zipfile.ZipInfo], storages: dict[int, int]) -> dict[int, int]:
    """Storage's address → the number of its member; empty where that cannot be told.

    The file is mapped as one run of pages, so addresses differ as places in the file do.

    Args:
        storages: address → bytes.
    """
    if not storages:
        return {}
    begins: dict[int, int] = {}
    with open(path, "rb") as stream:
        for i, member in enumerate(members):
            stream.seek(member.header_offset + _LENGTHS)
            name_bytes, extra_bytes = struct.unpack("<HH", stream.read(4))
            begins[member.header_offset + _LENGTHS + 4 + name_bytes + extra_bytes] = i
    first = min(storages)
    for begin in begins:
        base = first - begin
        if base % mmap.PAGESIZE:
            continue
        found = {address: begins.get(address - base) for address in storages}
        if all(i is not None and members[i].file_size == storages[address] for address, i in found.items()):
            return {address: i for address, i in found.items() if i is not None}
    return {}


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.300}"


def _check_archive(path: Path) -> list[zipfile.ZipInfo]:
    """The members of an archive as torch writes it."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(4)
    if start != b"PK\x03\x04":
        old = start[:2] == b"\x80\x02"
        hint = ": written by torch before 1.6? Load and save it again with a newer one" if old else ""
        raise CorruptCheckpoint(f"{path} is no archive of torch.save{hint}")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) > MOST_MEMBERS:
        raise CorruptCheckpoint(f"{path} has {len(members):,} members, at most {MOST_MEMBERS:,} are read")
    names = [member.filename for member in members]
    root = names[0].split("/", 1)[0] + "/" if names else ""
    if len(set(names)) != len(names):
        raise CorruptCheckpoint(f"{path} has two members of one name")
    for member in members:
        parts = member.filename.split("/")
        if not member.filename.startswith(root) or ".." in parts or "\\" in member.filename or not all(parts):
            raise CorruptCheckpoint(f"{path}: {member.filename!r:.80} is no member that torch.save writes")
        stored = member.compress_type == zipfile.ZIP_STORED and member.compress_size == member.file_size
        if not stored or member.flag_bits & 0x1 or member.header_offset + member.file_size > size:
            raise CorruptCheckpoint(f"{path}: member {member.filename!r:.80} is packed, or not all there")
        if "constants.pkl" in parts:
            raise CorruptCheckpoint(f"{path} is a TorchScript program, not a checkpoint")
    return members


def _read_pickle(path: Path, members: list[zipfile.ZipInfo]) -> bytes:
    found = [member for member in members if member.filename.split("/")[1:] == ["data.pkl"]]
    if len(found) != 1 or found[0].file_size > MOST_PICKLE_BYTES:
        raise CorruptCheckpoint(f"{path} has no data.pkl of at most {MOST_PICKLE_BYTES:,} bytes")
    with zipfile.ZipFile(path) as archive:
        return archive.read(found[0])  # checks its CRC-32


def _check_pickle(content: bytes, path: Path, known: dict[str, type[Standin]], members: dict[str, int]) -> None:
    """Refuse a pickle that names what a checkpoint has no use for, or storages that are not there as it says.

    Opcodes are read, none is carried out. torch.save names a storage by one tuple of atoms, which may be remembered:
    MARK "storage" torch.FloatStorage "0" "cpu" 1500 TUPLE BINPERSID.

    Args:
        members: bytes of each of the archive's.
    """
    protocol: Any = None
    run: list[Any] = []  # atoms since the last mark
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
        name = opcode.name
        if name == "PROTO":
            protocol = argument
        elif name == "GLOBAL":
            _check_name(str(argument), path, known)
        elif name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "PERSID"):
            raise CorruptCheckpoint(f"{path}: its pickle has opcode {name}, which torch.save does not write")
        elif name == "BINPERSID":
            _check_storage(run[-1] if run else None, path, members)
        if name in _ATOMS:
            run.append(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            run.append(memo.get(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = run[-1] if run else None
        elif name == "TUPLE":
            run = [tuple(run)]
        else:
            run = []
    if protocol != _PROTOCOL:
        raise CorruptCheckpoint(f"{path}: its pickle is of protocol {protocol}, torch.save writes {_PROTOCOL}")


def _check_name(argument: str, path: Path, known: dict[str, type[Standin]]) -> None:
    named = argument.replace(" ", ".")
    if argument not in SAFE_GLOBALS and named not in known:
        raise CorruptCheckpoint(
            f"{path} names {named!r:.120}, which no checkpoint of tensors needs: it is not read. If you trust whoever "
            "wrote it, load it there without that object and save it again"
        )


def _check_storage(said: Any, path: Path, members: dict[str, int]) -> None:
    if not (isinstance(said, tuple) and len(said) == 5 and said[0] == "storage" and said[1] in _STORAGE_BYTES):
        raise CorruptCheckpoint(f"{path}: its pickle names a storage as {said!r:.120}")
    _, kind, key, _, numel = said
    size = members.get(f"data/{key}")
    if not isinstance(numel, int) or numel * _STORAGE_BYTES[kind] != size:
        there = "is not there" if size is None else f"has {size:,} bytes"
        raise CorruptCheckpoint(f"{path}: storage {key!r:.40} of {numel!r:.20} elements {there}")


def _load(path: Path, known: dict[str, type[Standin]]) -> Any:
    answers: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [(made, name) for name, made in known.items()]
    with _LOADING, torch.serialization.safe_globals(answers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _Copier:
    """Copies what was loaded into objects of Python's own, asking the loaded ones for nothing by name."""

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.left = path, most
        self.storages: dict[int, int] = {}

    def copy(self, value: Any, level: int) -> Any:
        self.left -= 1
        if level > MOST_LEVELS or self.left < 0:
            raise CorruptCheckpoint(f"{self.path} has more values than a file of its size, or more levels of them")
        kind = type(value)
        if value is None or kind in (bool, int, float, str, bytes, torch.dtype):
            return value
        if kind in (torch.Tensor, torch.nn.Parameter):
            return self._tensor(value)
        if kind is dict or kind is OrderedDict:
            return {self._key(k): self.copy(v, level + 1) for k, v in kind.items(value)}
        if kind is list:
            return [self.copy(v, level + 1) for v in value]
        if kind is tuple or kind is torch.Size:
            return tuple(self.copy(v, level + 1) for v in value)
        if kind is set:
            return {self._key(v) for v in value}
        if isinstance(value, Standin):
            made = object.__new__(kind)
            made.args = self.copy(object.__getattribute__(value, "args"), level + 1)
            made.held = self.copy(object.__getattribute__(value, "held"), level + 1)
            return made
        raise CorruptCheckpoint(f"{self.path} has a {kind.__module__}.{kind.__name__}, which is no value")

    def _key(self, key: Any) -> Any:
        if type(key) not in (str, int, float, bool, type(None)):
            raise CorruptCheckpoint(f"{self.path} has a key that is a {type(key).__name__}")
        return key

    def _tensor(self, value: Tensor) -> Tensor:
        plain = torch.Tensor.detach(value)  # leaves behind what attributes the file gave it
        inside = (
            plain.device.type == "cpu"
            and plain.layout == torch.strided
            and not (plain.is_quantized or plain.is_conj() or plain.is_neg())
        )
        # one value may stand for many (an expanded tensor): as a flat it would be as large as the file says
        if not inside or plain.numel() * plain.element_size() > plain.untyped_storage().nbytes():
            raise CorruptCheckpoint(
                f"{self.path} has a tensor {tuple(plain.shape)} that is not so many values in memory"
            )
        if plain.numel():
            self.storages[plain.untyped_storage().data_ptr()] = plain.untyped_storage().nbytes()
        return plain


def _pass_over(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    with archive.open(member) as stream:
        while stream.read(_BLOCK_BYTES):
            pass
