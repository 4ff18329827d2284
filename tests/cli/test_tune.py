"""`tritonspeed tune`: what it lists anywhere, what it says without a GPU, and what it prints of a search."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tritonspeed import cli, tuning
from tritonspeed.cli import report, tune
from tritonspeed.kernels import tuned
from tritonspeed.kernels.cards import CARDS
from tritonspeed.kernels.store import Entry, FolderStore, default_folder
from tritonspeed.kernels.tuned import TUNABLES
from tritonspeed.tuning import Outcome

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
LIST = ("tune", "--list", "--kernel", "adamw", "--shapes", "tiny", "--workers", "0")


@pytest.fixture(autouse=True)
def own_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "_stores", [])


@without_gpu
def test_without_a_gpu_it_says_what_it_would_tune_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--kernel", "adamw", "--shapes", "tiny"]) == 1
    said = capsys.readouterr().err
    assert "There is no GPU here, so there is nothing to time" in said and "its heuristic works out" in said
    assert re.search(r"ask for 1 decisions among 7 candidates: adamw_ \(1\)", said)
    assert not default_folder().exists(), "nothing was measured, so nothing is written"


def test_a_list_compiles_for_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*LIST, "--card", "sm_80"]) == 0
    said = capsys.readouterr().out
    assert "1 decisions on cuda/sm_80/108sm-40mib-80gib: 7 of 7 candidates compile well" in said
    assert "adamw_ forward n=43008 bf16" in said and "block=1024,num_warps=8 (heuristic)" in said


def test_a_list_shows_what_the_store_decides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = Entry({"block": 2048, "num_warps": 8})
    FolderStore(default_folder()).put(CARDS["sm_90"], "adamw_", TUNABLES["adamw_"].source, "", entry)
    for extra, taken in (
        ((), "block=2048,num_warps=8"),
        (("--deterministic",), "block=1024,num_warps=8 (heuristic)"),
        (("--out", str(tmp_path / "elsewhere")), "block=1024,num_warps=8 (heuristic)"),
    ):
        assert cli.main([*LIST, "--card", "sm_90", *extra]) == 0
        assert taken in capsys.readouterr().out


def test_the_environment_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shared"
    entry = Entry({"block": 4096, "num_warps": 16})
    FolderStore(folder).put(CARDS["sm_90"], "adamw_", TUNABLES["adamw_"].source, "", entry)
    monkeypatch.setenv("TRITONSPEED_CONFIG_DIR", str(folder))
    assert cli.main([*LIST, "--card", "sm_90"]) == 0
    assert "block=4096,num_warps=16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kernel", "attention"), "--kernel attention: there is no such kernel; families: .*adamw"),
        (("--shapes", "llama9000"), "neither a model"),
        (("--time-limit", "0"), "--time-limit 0 must be more than 0 seconds"),
        (("--workers", "-1"), "--workers -1 must be at least 0"),
        (("--card", "sm_90"), "--card and --deterministic are for --list"),
        (("--deterministic",), "--card and --deterministic are for --list"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["adamw", "adamw_", "sum_of_squares"])
def test_a_family_an_operation_and_a_tunable_are_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--list", "--kernel", name, "--shapes", "tiny", "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "1 decisions on" in said and ("adamw_" if name.startswith("adamw") else "sum_of_squares") in said


OUTCOMES = [
    Outcome(
        "adamw_", {}, "s", "adamw_ forward n=9 bf16", "tuned", {"block": 512, "num_warps": 4}, 0.125, 7, 5, ("2 spill",)
    ),
    Outcome("norm", {"n": 4096}, "s", "norm forward", "heuristic", {"block": 1}, 0.0, 3, 3),
    Outcome("norm", {"n": 8192}, "s", "norm forward", "out of time", None, 0.0, 3, 3),
]


@pytest.mark.parametrize(("verdict", "status"), [("heuristic", 0), ("rejected", 0), ("skipped", 1)])
def test_a_search_is_printed(
    verdict: str, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {}

    def search(cases, folder, *, names, search, mesh, on_progress):
        asked.update(folder=folder, names=names, search=search, cases=[case.name for case in cases])
        on_progress("compiling", 1, 2)
        on_progress("decisions", 2, 2)
        return [*OUTCOMES, Outcome("other", {}, "s", "other", verdict, None, why=("[bold]because",))]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.comm, "mesh_of", lambda: tune.comm.Mesh(0, 1, torch.device("cpu"), "none"))
    monkeypatch.setattr(tuning, "tune", search)
    words = ["--kernel", "adamw", "--shapes", "tiny", "--dtype", "fp32", "bf16", "--time-limit", "9", "--again"]
    assert cli.main(["tune", *words, "--out", str(tmp_path / "out")]) == status
    said = capsys.readouterr()
    assert "2 of 2 decisions" in said.err
    assert "12.5 %" in said.out and "block=512,num_warps=4" in said.out and "[bold]because" in said.out
    counted = "1 tuned, 2 heuristic, 1 out of time;"
    assert (counted if verdict == "heuristic" else f"1 tuned, 1 heuristic, 1 out of time, 1 {verdict};") in said.out
    assert "goes on where the time ran out" in said.out and str(tmp_path / "out") in said.out.replace("\n", "")
    assert asked["folder"] == tmp_path / "out" and asked["cases"] == ["adamw_"] * 4 and "adamw_" in asked["names"]
    assert asked["search"].time_limit_s == 9 and asked["search"].again


def test_the_report_counts_what_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    store = FolderStore(default_folder())
    for n in range(3):
        store.put(CARDS["sm_90"], "adamw_", "s", f"n={n}", Entry({"block": 1}))
    store.put(CARDS["sm_90"], "other", "s", "", Entry({"block": 1}))
    assert cli.main(["report", "--no-kernels", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tuned"][str(default_folder())] == {CARDS["sm_90"].key: 4}
    row = next(row for row in found["rows"] if row["what"] == "tuned launch configurations")
    assert f"4 for {CARDS['sm_90'].key}" in row["found"]
    assert report._tuned_row({}).found == "none"


@without_gpu
def test_a_process_of_its_own_ends_with_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tritonspeed.cli", "tune", "--kernel", "adamw", "--shapes", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no GPU here" in done.stderr and done.stdout == ""
