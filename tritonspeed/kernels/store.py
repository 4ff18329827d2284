"""Tuned configurations on disk: one JSON file per card and tunable, and beside it a journal of all that was timed.

    {folder}/{backend}/{arch}/{properties}/<tunable>.json      what is looked up: features → kernel source → Entry
    {folder}/{backend}/{arch}/{properties}/<tunable>.journal   a line per timed candidate and per accepted entry
                                           <tunable>.lock      held while one of the two is changed

The folder is ``~/.cache/tritonspeed/tuned`` unless ``ts.tuning.use(directory=...)`` says otherwise; behind it stands
``shipped/`` beside this file, what was measured by us. A configuration of the very card comes first, wherever it
stands, then one of another card of the same architecture, else nothing.

Any number of processes may write: each change is read, merged and renamed into place under a lock, so that a reader
sees the old file or the new one. What a call of ``put`` or ``record`` has returned from survives a kill and a power
cut. A file that cannot be read is reported, moved aside as ``.corrupt`` and built again from the journal.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tritonspeed.kernels.cards import Card

try:
    import fcntl
except ImportError:  # Windows: no Triton there either; reading works
    fcntl: Any = None

FORMAT = 1
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class Entry:
    """One measured decision.

    Attributes:
        launch: the configuration's fields.
        is_heuristic: nothing beat the heuristic's own choice; it holds for this card alone.
        measured: how it came about: date, versions, driver, case, median, p20 and p80 in µs, GB/s, % of peak,
            number of candidates. For people to read; nothing looks it up.
    """

    launch: dict[str, int]
    is_heuristic: bool = False
    measured: dict[str, Any] = field(default_factory=dict)


Entries = dict[str, dict[str, Entry]]  # features → source → entry


class Corrupt(Exception):
    """A file's contents are not what a store writes; the text says where."""


class Unwritable(ValueError):
    """A store's folder cannot be written."""


class Newer(Exception):
    """A file's format is of a later version of this package."""


class FolderStore:
    """The configurations in one folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        self._read: dict[Path, Entries] = {}

    def __repr__(self) -> str:
        return f"FolderStore({str(self.folder)!r})"

    def path(self, card_key: str, name: str) -> Path:
        """The file of one card and tunable."""
        assert re.fullmatch(r"[\w.-]+", name), f"{name!r} is no name for a file"
        return self.folder / card_key / f"{name}.json"

    def lookup(self, card: Card, name: str, source: str, features: str) -> dict[str, int] | None:
        """The configuration for this card, or for another one of its architecture."""
        return self.exact(card, name, source, features) or self.related(card, name, source, features)

    def exact(self, card: Card, name: str, source: str, features: str) -> dict[str, int] | None:
        """The configuration that was measured on such a card."""
        entry = self.entries(card.key, name).get(features, {}).get(source)
        return None if entry is None else dict(entry.launch)

    def related(self, card: Card, name: str, source: str, features: str) -> dict[str, int] | None:
        """The configuration of the card of the same architecture whose number of SMs, then name, is the nearest."""
        for card_key in self._siblings(card):
            entry = self.entries(card_key, name).get(features, {}).get(source)
            if entry is not None and not entry.is_heuristic:
                return dict(entry.launch)
        return None

    def _siblings(self, card: Card) -> list[str]:
        home = self.folder / card.backend / card.arch
        try:
            names = [path.name for path in home.iterdir() if path.is_dir()]
        except OSError:
            return []

        def distance(name: str) -> tuple[float, str]:
            num_sms = re.match(r"(\d+)sm-", name)
            return abs(int(num_sms[1]) - card.num_sms) if num_sms else float("inf"), name

        keys = [f"{card.backend}/{card.arch}/{name}" for name in sorted(names, key=distance)]
        return [key for key in keys if key != card.key]

    def entries(self, card_key: str, name: str) -> Entries:
        """All of one file, read once; empty where there is none."""
        path = self.path(card_key, name)
        if path not in self._read:
            self._read[path] = self._load(path)
        return self._read[path]

    def _load(self, path: Path) -> Entries:
        try:
            return parse(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except Newer as error:
            warnings.warn(f"{path}: {error}; it is not used", stacklevel=2)
            return {}
        except OSError as error:
            warnings.warn(f"{path} cannot be read, it is not used: {error}", stacklevel=2)
            return {}
        except Corrupt as error:
            return self._rebuild(path, error)

    def _rebuild(self, path: Path, error: Corrupt) -> Entries:
        """Report, move aside, and write what the journal still knows. Where nothing can be written, only report."""
        try:
            with _locked(path):
                return _read_or_rebuild(path)
        except OSError as refused:
            found = _accepted(journal_of(path))
            warnings.warn(
                f"{path} is corrupt ({error}) and cannot be replaced ({refused}): the {_count(found)} entries of its"
                " journal are used",
                stacklevel=2,
            )
            return found

    def forget(self) -> None:
        """Read the files again when they are next asked for."""
        self._read.clear()

    def put(self, card: Card, name: str, source: str, features: str, entry: Entry) -> None:
        """Merge one entry into its file; it is on disk when this returns.

        Raises:
            Unwritable: the folder cannot be written, or its file is of a later version.
        """
        path = self.path(card.key, name)
        line = {"kind": "accepted", "features": features, "source": source, "entry": asdict(entry)}
        with self._writing(path):
            entries = _read_or_rebuild(path)
            entries.setdefault(features, {})[source] = entry
            _append(journal_of(path), line)
            _replace(path, render(name, entries))
            self._read[path] = entries

    def record(self, card: Card, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append what was timed to the journal; it is on disk when this returns.

        Raises:
            Unwritable: the folder cannot be written.
        """
        path = self.path(card.key, name)
        with self._writing(path):
            _append(journal_of(path), *({"kind": "timed", **line} for line in lines))

    def timed(self, card: Card, name: str, source: str, features: str) -> list[dict[str, Any]]:
        """What was timed for these since the last accepted entry, in order: where a search that was cut off goes on."""
        found: list[dict[str, Any]] = []
        for line in read_journal(journal_of(self.path(card.key, name))):
            if line.get("source") == source and line.get("features") == features:
                found = [*found, line] if line.get("kind") == "timed" else []
        return found

    def check_writable(self, card: Card, name: str) -> None:
        """Find out before an hour of timing, not after.

        Raises:
            Unwritable: the folder cannot be written, or its file is of a later version.
        """
        path = self.path(card.key, name)
        with self._writing(path):
            _read_or_rebuild(path)

    def summary(self) -> dict[str, dict[str, int]]:
        """Card → tunable → number of entries."""
        found: dict[str, dict[str, int]] = {}
        for path in sorted(self.folder.glob("*/*/*/*.json")):
            card_key = path.parent.relative_to(self.folder).as_posix()
            found.setdefault(card_key, {})[path.stem] = _count(self.entries(card_key, path.stem))
        return found

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                yield
        except Newer as error:
            raise Unwritable(f"{path}: {error}: update tritonspeed, or name another folder") from error
        except OSError as error:
            raise Unwritable(
                f"tuned configurations cannot be written to {self.folder}: {error}: name a folder that you may write"
                " (`tritonspeed tune --out DIR`, ts.tuning.use(directory=...))"
            ) from error


class Layers:
    """Several stores as one: what was measured on the very card first, in whichever; then what is related."""

    def __init__(self, stores: Sequence[FolderStore]) -> None:
        self.stores = tuple(stores)

    def __repr__(self) -> str:
        return f"Layers({', '.join(map(repr, self.stores))})"

    def forget(self) -> None:
        """Read the files again when they are next asked for."""
        for store in self.stores:
            store.forget()

    def lookup(self, card: Card, name: str, source: str, features: str) -> dict[str, int] | None:
        """The first answer."""
        for look in (FolderStore.exact, FolderStore.related):
            for store in self.stores:
                found = look(store, card, name, source, features)
                if found is not None:
                    return found
        return None


def default_folder() -> Path | None:
    """The user's folder; None for a user without a home."""
    try:
        return Path.home() / ".cache" / "tritonspeed" / "tuned"
    except RuntimeError:
        return None


def default_stores() -> list[Layers]:
    """What a program that chose nothing looks in: the user's folder, then the shipped one."""
    folders = [folder for folder in (default_folder(), SHIPPED) if folder is not None]
    return [Layers([FolderStore(folder) for folder in folders])]


def parse(contents: bytes) -> Entries:
    """A file's entries.

    Raises:
        Corrupt: not such a file.
        Newer: a later format.
    """
    try:
        found = json.loads(contents)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Corrupt(f"no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise Corrupt("no object with a format number")
    if found["format"] > FORMAT:
        raise Newer(f"its format {found['format']} is of a later version, this one reads {FORMAT}")
    by_features = found.get("entries")
    if not isinstance(by_features, dict):
        raise Corrupt(f"entries is a {type(by_features).__name__}, must be an object")
    entries: Entries = {}
    for features, by_source in by_features.items():
        if not isinstance(by_source, dict):
            raise Corrupt(f"entries of {features!r} are a {type(by_source).__name__}, must be an object")
        entries[features] = {source: _entry(features, value) for source, value in by_source.items()}
    return entries


def _entry(features: str, value: Any) -> Entry:
    if not isinstance(value, dict) or not isinstance(value.get("launch"), dict):
        raise Corrupt(f"the entry of {features!r} has no launch")
    wrong = {name: field for name, field in value["launch"].items() if not isinstance(field, int)}
    if wrong:
        raise Corrupt(f"the launch of {features!r} has fields that are no whole numbers: {wrong}")
    is_heuristic, measured = value.get("is_heuristic", False), value.get("measured", {})
    if not isinstance(is_heuristic, bool) or not isinstance(measured, dict):
        raise Corrupt(f"the entry of {features!r} has fields of other types")
    return Entry(value["launch"], is_heuristic, measured)


def render(name: str, entries: Entries) -> bytes:
    """A file, in an order that does not depend on who wrote when."""
    by_features = {
        features: {source: asdict(entry) for source, entry in sorted(by_source.items())}
        for features, by_source in sorted(entries.items())
    }
    contents = {"format": FORMAT, "tunable": name, "entries": by_features}
    return (json.dumps(contents, indent=1) + "\n").encode()


def journal_of(path: Path) -> Path:
    """The journal beside a file."""
    return path.with_suffix(".journal")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines whose checksum is right, without one that a kill cut short and whatever a disk made of others."""
    try:
        raw = path.read_bytes()
    except OSError:
        return []
    found = []
    for line in raw.split(b"\n"):
        checksum, _, text = line.partition(b" ")
        if checksum == _checksum(text):
            value = json.loads(text)
            if isinstance(value, dict):
                found.append(value)
    return found


def _accepted(journal: Path) -> Entries:
    entries: Entries = {}
    for line in read_journal(journal):
        if line.get("kind") == "accepted":
            with suppress(Corrupt, KeyError):
                entries.setdefault(line["features"], {})[line["source"]] = _entry(line["features"], line["entry"])
    return entries


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _count(entries: Entries) -> int:
    return sum(map(len, entries.values()))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. The lock's file stays: who removes it may give two processes a lock each."""
    if fcntl is None:
        raise OSError("there are no file locks on this system")
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)  # lets go of it, as a kill does


def _read_or_rebuild(path: Path) -> Entries:
    """Under the lock: what the file says; if it is corrupt, what its journal says, written anew."""
    try:
        return parse(path.read_bytes())
    except FileNotFoundError:
        return {}
    except Corrupt as error:
        aside = path.with_suffix(".corrupt")
        shutil.copyfile(path, aside)  # a copy: at no moment is the file away while its journal has entries
        entries = _accepted(journal_of(path))
        _replace(path, render(path.stem, entries))
        warnings.warn(
            f"{path} is corrupt ({error}): moved to {aside.name}, {_count(entries)} entries rebuilt from its journal",
            stacklevel=2,
        )
        return entries


def _append(journal: Path, *lines: Mapping[str, Any]) -> None:
    """Under the lock: add whole lines, and wait until they are on the disk."""
    handle = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(handle).st_size
        text = b"\n" if size and os.pread(handle, 1, size - 1) != b"\n" else b""  # a kill has cut the last line short
        for line in lines:
            said = json.dumps(line).encode()
            text += _checksum(said) + b" " + said + b"\n"
        written = os.write(handle, text)
        if written != len(text):
            raise OSError(f"{journal}: {written} of {len(text)} bytes written, the disk may be full")
        os.fsync(handle)
    finally:
        os.close(handle)
    if not size:
        _sync_folder(journal.parent)


def _replace(path: Path, contents: bytes) -> None:
    """Under the lock: the whole new file or the old one, whenever the power goes."""
    temporary = path.with_suffix(".tmp")  # one name is enough under the lock, and a kill leaves at most one behind
    with open(temporary, "wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
