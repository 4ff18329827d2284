"""What ships: valid, of kernels that are there, compiled well for its card at the shapes that it was measured at."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from toys import CARD, HUNGRY, hungry_case

from tritonspeed.kernels import tuned
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.store import SHIPPED, Entry, FolderStore, parse
from tritonspeed.kernels.tuned import TUNABLES
from tritonspeed.tuning import Case, all_cases, plan, prune
from tritonspeed.tuning.planning import import_all_tunables
from tritonspeed.tuning.shapes import MODELS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def complaints(folder: Path, cases: Iterable[Case]) -> list[str]:
    """What is wrong with the entries of a folder of configurations."""
    cases, found = list(cases), []
    for path in sorted(folder.rglob("*.json")):
        tunable, card = TUNABLES.get(path.stem), CARDS.get(path.parts[-3])
        if tunable is None or card is None:
            found.append(f"{path}: there is no such kernel, or no such architecture is compiled for")
            continue
        current = {
            features: by_source[tunable.source] for features, by_source in parse(path.read_bytes()).items()
            if tunable.source in by_source
        }  # fmt: skip
        jobs = {job.key[1]: job for job in plan(cases, card, names=[path.stem]) if job.tunable is tunable}
        for features, entry in current.items():
            if entry.launch.keys() != tunable.fields:
                found.append(f"{path}: {features}: fields {sorted(entry.launch)}")
            elif features not in jobs:
                found.append(f"{path}: {features}: no case asks for it")
            else:
                job = jobs[features]
                job.candidates = [c for c in job.candidates if c.launch == tunable.launch(**entry.launch)]
                if not job.candidates:
                    found.append(f"{path}: {features}: {entry.launch} is no candidate")
                prune([job], card, num_workers=0)
                found += [f"{path}: {features}: {entry.launch} {c.refused}" for c in job.candidates if c.refused]
        if not current:
            found.append(f"{path}: every entry is of a kernel that has changed since: tune again, or remove it")
    return found


def test_what_ships_compiles_well() -> None:
    import_all_tunables()
    by_family = [all_cases(MODELS.values(), dtype) for dtype in DTYPES if list(SHIPPED.rglob("*.json"))]
    cases = [case for some in by_family for family in some.values() for case in family]
    assert complaints(SHIPPED, cases) == []


@pytest.mark.parametrize(
    ("launch", "source", "complaint"),
    [
        ({"block": 2048, "num_warps": 4}, None, ""),
        ({"block": 16384, "num_warps": 1}, None, "spills registers"),
        ({"block": 512, "num_warps": 4}, None, "is no candidate"),
        ({"block": 2048, "warps": 4}, None, "fields"),
        ({"block": 2048, "num_warps": 4}, "older", "has changed since"),
    ],
)
def test_what_should_not_ship_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: dict[str, int], source: str | None, complaint: str
) -> None:
    monkeypatch.setattr(tuned, "_stores", [])
    FolderStore(tmp_path).put(CARD, "hungry", source or HUNGRY.source, "", Entry(launch))
    found = complaints(tmp_path, [hungry_case()])
    assert bool(found) == bool(complaint) and all(complaint in line for line in found)


def test_what_nobody_asks_for_is_noticed(tmp_path: Path) -> None:
    FolderStore(tmp_path).put(CARD, "hungry", HUNGRY.source, "n=1", Entry({"block": 2048, "num_warps": 4}))
    FolderStore(tmp_path).put(CARD, "gone", "s", "", Entry({"block": 2048}))
    no_such_kernel, no_case = complaints(tmp_path, [hungry_case()])
    assert "no such kernel" in no_such_kernel and "no case asks for it" in no_case
