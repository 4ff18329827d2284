"""Checkpoints of ours that were damaged or forged: how to do it, and how to see what becomes of a reader."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from handmade import spread, write
from torch import Tensor

from tritonspeed.checkpoint import CheckpointError, ParameterFacts
from tritonspeed.checkpoint.manifest import INDEX, MANIFEST
from tritonspeed.checkpoint.stored import StoredCheckpoint
from tritonspeed.offload.commit_record import digest_of

SHAPES = {"embed": (40, 9), "norm": (33,), "head": (25, 11), "scale": (), "nothing": (0, 4)}
KINDS = ("master", "exp_avg", "gradient", "outbox")
WORLD = 2


class Fixture:
    """A good checkpoint, its values, and a copy of it to damage."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.truth = {kind: {n: torch.randn(s).flatten() for n, s in SHAPES.items()} for kind in KINDS}
        self.parameters = {n: ParameterFacts(s, torch.bfloat16, True, (f"{n}_tied",)) for n, s in SHAPES.items()}
        ranks = spread(self.truth, WORLD, random.Random(5))
        for rank, content in enumerate(ranks):
            content.scalars = [({"step": 7.0}, tuple(SHAPES))]
            content.state = {
                "run": {"global_steps": 7, "optimizer": "AdamW", "param_groups": [{"lr": 1e-3}]},
                "random": {"cpu": torch.arange(40, dtype=torch.uint8), "place": (rank, 2.5)},
            }
        self.good = write(folder / "good", self.parameters, ranks, run_bytes=512, gap=3)
        self.path = folder / "damaged"
        self.reset()

    def reset(self) -> None:
        """Undo all damage."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.good, self.path)

    def files(self) -> list[Path]:
        """Every file of it, relative."""
        return sorted(p.relative_to(self.good) for p in self.good.rglob("*") if p.is_file())

    @contextmanager
    def changed(self, file: Path | str, content: bytes) -> Iterator[None]:
        """One file with other content for a while."""
        (self.path / file).write_bytes(content)
        try:
            yield
        finally:
            shutil.copyfile(self.good / file, self.path / file)

    @contextmanager
    def forged(self, rank: int, change: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
        """A rank's index after ``change``, with all digests that name it made right."""
        name = f"rank-{rank}-of-{WORLD}/{INDEX}"
        content = json.loads((self.good / name).read_text())
        changed = change(content)
        text = seal(content if changed is None else changed)
        manifest = json.loads((self.good / MANIFEST).read_text())
        manifest["indexes"][rank] = digest_of(text)
        with self.changed(name, text), self.changed(MANIFEST, seal(manifest)):
            yield

    def outcome(self, verify: str = "full") -> str:
        """Read everything: "right", or "refused" with a reason. Anything else is an error, wrong values above all,
        unless nothing is compared.
        """
        try:
            with StoredCheckpoint(self.path, verify) as found:
                for name in found.parameters:
                    for kind in found.kinds(name):
                        self._compare(found, kind, name, verify == "none")
                    for key, value in found.scalars(name).items():
                        assert isinstance(key, str) and isinstance(value, int | float), f"{key!r}: {value!r}"
                for rank in range(found.manifest.world):
                    assert isinstance(found.rank_state(rank), dict), f"state of rank {rank}"
                assert isinstance(found.facts.global_steps, int), "facts"
                found.check_all()
        except CheckpointError as error:
            assert str(error), "an error without a reason"
            str(error).encode()  # what cannot be printed explains nothing
            return "refused"
        return "right"

    def _compare(self, found: StoredCheckpoint, kind: str, name: str, any_values: bool) -> None:
        numel = torch.Size(found.parameters[name].shape).numel()
        if kind == "outbox":
            for rank in range(found.manifest.world):
                own = found.read_own(kind, rank, name, 0, numel)
                if own is not None and not any_values:
                    self._same(own, self.truth[kind][name] * (rank + 1), f"{kind} of {name} of rank {rank}")
            found.read("gradient", name, 0, numel)
        elif any_values or not numel:
            assert found.read(kind, name, 0, numel).numel() == numel, f"{kind} of {name}"
        elif not (kind == "gradient" and "outbox" in found.kinds(name)):
            self._same(found.read(kind, name, 0, numel), self.truth[kind][name], f"{kind} of {name}")

    @staticmethod
    def _same(got: Tensor, want: Tensor, what: str) -> None:
        assert torch.equal(got.flatten(), want), f"wrong values were given: {what}"


def seal(content: Any) -> bytes:
    """JSON with a right digest of itself, whatever it says."""
    if not isinstance(content, dict):
        return json.dumps(content).encode()
    content = {key: value for key, value in content.items() if key != "digest"}
    digest = digest_of(json.dumps(content, sort_keys=True).encode())
    return (json.dumps({"digest": digest, **content}) + "\n").encode()


HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 0.0, 0.5, 1.0, -0.0, 1e308, 2**31, 2**53, 2**53 + 1, 2**63, 2**64, 10**400,
    "", "x", "..", ".", "../../outside", "/etc/passwd", "a/b", "a\\b", "nul\0", "\ud800", "x" * 300, "größe", "0" * 16,
    [], [[]], [0], [0, 0], [-1], [2**62, 2**62], ["a", 0, 1, 0], {}, {"$tensor": "x"}, {"$unknown": 1}, {"": {}},
]  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in a JSON tree, the root not."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate(content: Any, rng: random.Random) -> str:
    """Change one value of a JSON tree: to something hostile, to another's, doubled, gone, nested; says what."""
    path = rng.choice(list(places(content)))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    way = rng.choice(("hostile", "hostile", "near", "other", "gone", "again", "nested", "renamed"))
    if way == "near" and isinstance(old, int) and not isinstance(old, bool):
        parent[key] = old + rng.choice((-4096, -512, -2, -1, 1, 2, 512, 4096))
    elif way == "other":
        other = content
        for step in rng.choice(list(places(content))):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    elif way == "gone":
        del parent[key]
    elif way == "again" and isinstance(parent, list):
        parent.insert(rng.randint(0, len(parent)), copy.deepcopy(old))
    elif way == "nested":
        parent[key] = [old] if rng.random() < 0.5 else {"x": old}
    elif way == "renamed" and isinstance(parent, dict):
        parent[rng.choice(("", "x", "..", "embed", "step", "\ud800"))] = parent.pop(key)
    else:
        parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return f"{way} at {path}"


def rearrange(index: dict[str, Any], rng: random.Random) -> str:
    """Change an index into another that could be one: what only comparing with the files can tell; says what."""
    files, layouts = index["files"], index["layouts"]
    a, b = rng.sample(files, 2)
    layout = rng.choice([each for each in layouts if each])
    one, other = rng.choice(layout), rng.choice(rng.choice([each for each in layouts if each]))
    by = rng.choice((1, 2, 3, 100))

    def longer() -> None:
        a["numel"] += by
        a["digests"].append([4 * (a["numel"] - by), 4 * a["numel"], "0" * 16])

    def joined() -> None:
        a["digests"] = [[0, a["digests"][-1][1], a["digests"][0][2]]]

    ways: dict[str, Callable[[], Any]] = {
        "names of files exchanged": lambda: exchange(a, b, "file"),
        "layouts exchanged": lambda: exchange(a, b, "layout"),
        "kinds exchanged": lambda: exchange(a, b, "kind"),
        "buckets exchanged": lambda: exchange(a, b, "bucket"),
        "digests exchanged": lambda: exchange(a, b, "digests"),
        "headers exchanged": lambda: exchange(a, b, "header"),
        "another kind": lambda: a.update(kind="exp_avg_sq"),
        "another dtype": lambda: a.update(dtype=rng.choice(("I32", "F16", "F64", "BOOL", "F8_E5M2"))),
        "less": lambda: files.remove(a),
        "moved": lambda: [each.__setitem__(3, each[3] + by) for each in layout],
        "names exchanged": lambda: exchange(one, other, 0),
        "intervals exchanged": lambda: [exchange(one, other, i) for i in (1, 2)],
        "another interval": lambda: [one.__setitem__(i, one[i] + by) for i in (1, 2)],
        "shorter": lambda: one.__setitem__(2, max(one[1], one[2] - by)),
        "longer": longer,
        "runs joined": joined,
        "begins later": lambda: a.update(begin=a["begin"] + 4096),
    }
    way = rng.choice(list(ways))
    ways[way]()
    return way


def exchange(a: Any, b: Any, key: Any) -> None:
    """Swap an entry of two containers."""
    a[key], b[key] = b[key], a[key]


class Watch:
    """What files this process opens while it is on: the interpreter tells (``sys.addaudithook``)."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.violations: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            where = os.path.abspath(os.fsdecode(path))
            is_inside = where == str(self.inside) or where.startswith(f"{self.inside}/")
            if not is_inside and not where.endswith((".py", ".pyc")):  # an import that was not needed before
                self.violations.append(f"{where} was opened")
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.violations.append(f"{where} was opened for writing")
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
            self.violations.append(f"{event} {args}")

    @contextmanager
    def on(self, inside: Path) -> Iterator[None]:
        """Files are opened within ``inside`` only, and only to be read."""
        self.inside, self.violations = inside, []
        try:
            yield
        finally:
            self.inside = None
        assert not self.violations, self.violations
